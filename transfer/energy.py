"""What a host's energy counters say, RAPL's and those of NVIDIA GPUs, and the power that follows from them.

RAPL is read by Linux's powercap (``Documentation/power/powercap/powercap.rst``): a package's zone holds ``name``,
``energy_uj`` and the ``max_energy_range_uj`` at which that begins at 0 again. Of its parts ``core`` and ``uncore`` are
in it, ``dram`` is beside it; ``psys`` is the whole board, packages and all, and is left out. GPUs count millijoules
(``nvmlDeviceGetTotalEnergyConsumption``, since Volta).
"""

from __future__ import annotations

import importlib
import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import structlog

POWERCAP = Path("/sys/class/powercap")
CPUS = Path("/sys/devices/system/cpu")
# A JSON Power, in the prefill node's answers to the proxy's heartbeat.
POWER_HEADER = "X-Isthmus-Power"
# Power is a mean over at least the one; what was read longer ago than the other may have wrapped more than once.
SHORTEST_NS = 1_000_000_000
LONGEST_NS = 60_000_000_000
_PACKAGE_ZONE = re.compile(r"intel-rapl:\d+")
_PACKAGE_NAME = re.compile(r"package-(\d+)(-die-\d+)?")

log = structlog.get_logger()


class Power(msgspec.Struct, frozen=True):
    """Mean power of a node over the last second or so, and the names of what was counted."""

    watts: float
    of: str


class Counter(NamedTuple):
    """One energy counter: joules since some beginning, up to ``wraps_at_j``, where it begins at 0 (0: it does not).

    ``package`` is the processor package's number. ``joules`` raises :class:`OSError` where it cannot be read any more.
    """

    name: str
    package: int | None
    wraps_at_j: float
    joules: Callable[[], float]


class Found(NamedTuple):
    """The counters of one kind that this host lets us read; ``why_none`` says why there are none."""

    counters: tuple[Counter, ...]
    why_none: str | None


def rapl(powercap: Path = POWERCAP, packages: Collection[int] | None = None) -> Found:
    """Packages and their DRAM (``package-0``, ``dram-0``), all of them or those with a number in ``packages``."""
    found: list[Counter] = []
    why = f"{powercap} has no RAPL package"
    for zone in sorted(powercap.glob("intel-rapl:*")):
        if not _PACKAGE_ZONE.fullmatch(zone.name):
            continue
        named = _PACKAGE_NAME.fullmatch(_read(zone / "name"))
        if not named or (packages is not None and int(named[1]) not in packages):
            continue
        drams = [part for part in sorted(zone.glob(f"{zone.name}:*")) if _read(part / "name") == "dram"]
        for name, folder in ((named[0], zone), *((named[0].replace("package", "dram"), part) for part in drams)):
            try:
                _joules(folder)
                wraps_at_j = int((folder / "max_energy_range_uj").read_text()) / 1e6
            except (OSError, ValueError) as error:
                hint = "; it is root's alone unless the host allows more" if isinstance(error, PermissionError) else ""
                why = f"{folder}/energy_uj cannot be read ({getattr(error, 'strerror', None) or error}){hint}"
            else:
                found.append(Counter(name, int(named[1]), wraps_at_j, partial(_joules, folder)))
    return Found(tuple(found), None if found else why)


def gpus(visible: str | None = None) -> Found:
    """NVIDIA GPUs (``gpu 0``), all of them or those that a ``CUDA_VISIBLE_DEVICES`` names by number or UUID."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return Found((), "nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
        if visible is None:
            names = [str(index) for index in range(nvml.nvmlDeviceGetCount())]
        else:
            names = [name.strip() for name in visible.split(",") if name.strip()]
        counters = []
        for name in names:
            get = nvml.nvmlDeviceGetHandleByIndex if name.isdecimal() else nvml.nvmlDeviceGetHandleByUUID
            joules = partial(_gpu_joules, nvml, get(int(name) if name.isdecimal() else name))
            joules()
            counters.append(Counter(f"gpu {name}", None, 0.0, joules))
    except (nvml.NVMLError, OSError) as error:
        return Found((), f"NVML: {error}")
    return Found(tuple(counters), None if counters else "NVML shows no GPU")


def own_packages(cpus: Path = CPUS) -> set[int] | None:
    """The packages whose processors this process may use; None if the kernel does not say."""
    try:
        topology = (cpus / f"cpu{cpu}" / "topology" / "physical_package_id" for cpu in os.sched_getaffinity(0))
        found = {int(path.read_text()) for path in topology}
    except (OSError, ValueError):
        return None
    return None if -1 in found else found


def meter(found: Found) -> PowerMeter:
    """A meter of ``found``; says in the log why it will know nothing, where it will not."""
    if found.why_none:
        log.info("power is not known", reason=found.why_none)
    return PowerMeter(found.counters)


def read_j(counters: Iterable[Counter]) -> dict[str, float]:
    """Joules now by counter, without those that cannot be read any more."""
    found = {}
    for counter in counters:
        with suppress(OSError):
            found[counter.name] = counter.joules()
    return found


def spent_j(
    before_j: dict[str, float], after_j: dict[str, float], wraps_at_j: dict[str, float]
) -> dict[str, float] | None:
    """Joules by counter between two readings, in which each wrapped once at most.

    None if there are none, or one of them could not be read or was set back.
    """
    spent = {}
    for name, began_j in before_j.items():
        joules = after_j.get(name, math.nan) - began_j
        spent[name] = joules if joules >= 0 else joules + (wraps_at_j[name] or math.nan)
    return spent if spent and not any(map(math.isnan, spent.values())) else None


class PowerMeter:
    """Power of ``counters`` between the times that somebody asks, at least a second apart. Not for several threads."""

    def __init__(self, counters: Iterable[Counter], clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._counters = tuple(counters)
        self._wraps_at_j = {counter.name: counter.wraps_at_j for counter in self._counters}
        self._clock_ns = clock_ns
        self._read_ns, self._read_j = clock_ns(), read_j(self._counters)
        self._watts: dict[str, float] = {}

    def watts(self) -> dict[str, float]:
        """Watts by counter; empty as long as they are not known of all."""
        before_ns, before_j, now_ns = self._read_ns, self._read_j, self._clock_ns()
        elapsed_ns = now_ns - before_ns
        if self._counters and elapsed_ns >= SHORTEST_NS:
            self._read_ns, self._read_j, self._watts = now_ns, read_j(self._counters), {}
            spent = spent_j(before_j, self._read_j, self._wraps_at_j)
            if spent and len(spent) == len(self._counters) and elapsed_ns <= LONGEST_NS:
                self._watts = {name: joules * 1e9 / elapsed_ns for name, joules in spent.items()}
        return self._watts

    def power(self) -> Power | None:
        """All of it together, None as long as it is not known."""
        watts = self.watts()
        return Power(round(sum(watts.values()), 2), ", ".join(watts)) if watts else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _joules(zone: Path) -> float:
    return int((zone / "energy_uj").read_text()) / 1e6


def _gpu_joules(nvml: Any, handle: Any) -> float:
    try:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except nvml.NVMLError as error:
        raise OSError(str(error)) from None
