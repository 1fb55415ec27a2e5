"""What the host did while something ran: energy, where it is counted, time that others took, and throttling."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import psutil

POWERCAP = Path("/sys/class/powercap")
CPUS = Path("/sys/devices/system/cpu")
_PACKAGE = re.compile(r"intel-rapl:\d+")


class Reading(NamedTuple):
    """Counters at one moment: joules since some beginning by source, and the counter's size where it wraps."""

    energy_j: dict[str, float]
    wraps_at_j: dict[str, float]
    steal_s: float
    cpu_s: float
    throttled: int | None


class Meanwhile(NamedTuple):
    """Between two readings. ``energy_j`` is None where nothing counts it, ``throttled`` where nothing says."""

    energy_j: dict[str, float] | None
    steal_share: float
    throttled: int | None


class HostWatch:
    """Reads the counters that this host has: RAPL packages (powercap) and NVIDIA GPUs (NVML, total energy).

    ``why_no_energy`` says what is missing where there are none. Only this host is seen.
    """

    def __init__(self, powercap: Path = POWERCAP, cpus: Path = CPUS) -> None:
        self._cpus = cpus
        self._packages = [path for path in sorted(powercap.glob("intel-rapl:*")) if _PACKAGE.fullmatch(path.name)]
        self._gpus = _nvml_devices()
        self.why_no_energy: str | None = None
        readable = [path for path in self._packages if _number(path / "energy_uj") is not None]
        if not readable and not self._gpus:
            rapl = f"{powercap} has no RAPL package" if not self._packages else f"{powercap}/*/energy_uj needs root"
            self.why_no_energy = f"{rapl}, and NVML shows no GPU that counts energy"
        self._packages = readable

    def read(self) -> Reading:
        """The counters now."""
        energy_j: dict[str, float] = {}
        wraps_at_j: dict[str, float] = {}
        for path in self._packages:
            energy_j[path.name] = (_number(path / "energy_uj") or 0) / 1e6
            wraps_at_j[path.name] = (_number(path / "max_energy_range_uj") or 0) / 1e6
        for index, (nvml, handle) in enumerate(self._gpus):
            energy_j[f"gpu {index}"] = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        times = psutil.cpu_times()
        counts = [
            _number(path) for path in sorted(self._cpus.glob("cpu[0-9]*/thermal_throttle/package_throttle_count"))
        ]
        known = [count for count in counts if count is not None]
        steal_s = float(getattr(times, "steal", 0.0))
        return Reading(energy_j, wraps_at_j, steal_s, float(sum(times)), sum(known) if known else None)


def between(before: Reading, after: Reading) -> Meanwhile:
    """What happened from ``before`` to ``after``; counters may have wrapped once."""
    energy_j = {
        source: after.energy_j[source] - began + (before.wraps_at_j.get(source, 0.0) * (after.energy_j[source] < began))
        for source, began in before.energy_j.items()
    }
    cpu_s = after.cpu_s - before.cpu_s
    throttled = (
        after.throttled - before.throttled if before.throttled is not None and after.throttled is not None else None
    )
    return Meanwhile(energy_j or None, (after.steal_s - before.steal_s) / cpu_s if cpu_s > 0 else 0.0, throttled)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _nvml_devices() -> list[tuple[Any, Any]]:
    """GPUs whose energy NVML counts; none without its Python binding, its library, or a GPU that counts."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        for handle in handles:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # noqa: BLE001 - NVML has an error of its own for each way of not being there
        return []
    return [(nvml, handle) for handle in handles]
