"""What the host did while something ran: energy, where it is counted, time that others took, and throttling."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import psutil

from transfer import energy
from transfer.energy import CPUS, POWERCAP


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
    """Reads the counters that this host has: RAPL packages and their DRAM (powercap), and NVIDIA GPUs (NVML).

    ``why_no_energy`` says what is missing where there are none. Only this host is seen.
    """

    def __init__(self, powercap: Path = POWERCAP, cpus: Path = CPUS) -> None:
        self._cpus = cpus
        found = (energy.rapl(powercap), energy.gpus())
        self._counters = [counter for kind in found for counter in kind.counters]
        self.why_no_energy = None if self._counters else "; ".join(kind.why_none for kind in found if kind.why_none)

    def read(self) -> Reading:
        """The counters now."""
        energy_j = energy.read_j(self._counters)
        wraps_at_j = {counter.name: counter.wraps_at_j for counter in self._counters}
        times = psutil.cpu_times()
        counts = [
            _number(path) for path in sorted(self._cpus.glob("cpu[0-9]*/thermal_throttle/package_throttle_count"))
        ]
        known = [count for count in counts if count is not None]
        steal_s = float(getattr(times, "steal", 0.0))
        return Reading(energy_j, wraps_at_j, steal_s, float(sum(times)), sum(known) if known else None)


def between(before: Reading, after: Reading) -> Meanwhile:
    """What happened from ``before`` to ``after``; counters may have wrapped once."""
    energy_j = energy.spent_j(before.energy_j, after.energy_j, before.wraps_at_j)
    cpu_s = after.cpu_s - before.cpu_s
    throttled = (
        after.throttled - before.throttled if before.throttled is not None and after.throttled is not None else None
    )
    return Meanwhile(energy_j, (after.steal_s - before.steal_s) / cpu_s if cpu_s > 0 else 0.0, throttled)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
