"""The processors: how fast they may run, who shares a core, and who else uses them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil

from isthmus.checks.finding import Finding, text

# Above this, `measure` calls a run doubtful.
BUSY_LOAD = 0.5
_LOOK_S = 0.4


def governor(root: Path) -> Finding:
    """Which frequencies the kernel chooses (Documentation/admin-guide/pm/cpufreq.rst)."""
    check, why = "CPU governor", "a core that must first clock up is late at the barriers of every token"
    files = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    counted = Counter(name for name in map(text, files) if name)
    if not counted:
        return Finding(check, "unknown", "no frequency control here (a virtual machine has none)", why)
    seen = ", ".join(f"{name} on {count}" for name, count in sorted(counted.items()))
    if set(counted) == {"performance"}:
        return Finding(check, "ok", seen, why)
    return Finding(check, "warn", seen, why, "cpupower frequency-set -g performance")


def smt(root: Path, threads: int, cores: int) -> Finding:
    """Whether decode threads share cores. ``threads`` as in ``[decode]``, 0 for one a core; ``cores`` of one worker."""
    check, why = "SMT placement", "siblings share one core's way to memory: twice the threads, twice the waiting"
    active = text(root / "sys/devices/system/cpu/smt/active") == "1"
    if threads > cores:
        seen = f"[decode] threads is {threads}, a worker has {cores} physical cores"
        return Finding(check, "fail" if not active else "warn", seen, why, "threads = 0 in [decode]")
    return Finding(check, "ok", f"{'SMT on' if active else 'no SMT'}, {threads or cores} threads on {cores} cores", why)


def throttling(root: Path) -> Finding:
    """How often the processors slowed down because of heat, since boot (Documentation/arch/x86/ thermal_throttle)."""
    check, why = "thermal throttling", "a processor that is too hot runs slower in the middle of a run"
    files = list((root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count"))
    counts = [int(count) for count in map(text, files) if count]
    if not counts:
        return Finding(check, "unknown", "no counters here", why)
    if not any(counts):
        return Finding(check, "ok", "never since boot", why)
    fix = "clean or speed up the fans; look at the power limit (`ipmitool sdr`, `turbostat`)"
    return Finding(check, "warn", f"up to {max(counts):,} times since boot", why, fix)


def load(average: float, busiest: Sequence[tuple[str, float]]) -> Finding:
    """Whether others compute: the load of the last minute, and processes with their share of a core."""
    check, why = "load of other processes", "decoding waits at barriers for its slowest thread"
    names = ", ".join(f"{name} {share:.0%}" for name, share in busiest)
    seen = f"load {average:.2f}" + (f": {names}" if names else "")
    if average <= BUSY_LOAD:
        return Finding(check, "ok", seen, why)
    return Finding(check, "warn", seen, why, "stop them, or wait; then measure")


def busiest_processes(count: int = 3) -> list[tuple[str, float]]:
    """The ``count`` processes that take most of a core now, over a tenth of one; looks for 0.4 s."""
    found = []
    processes = list(psutil.process_iter(["name"]))
    for process in processes:
        try:
            process.cpu_percent()
        except psutil.Error:
            continue
    time.sleep(_LOOK_S)
    for process in processes:
        try:
            found.append((str(process.info["name"]), process.cpu_percent() / 100))
        except psutil.Error:
            continue
    return sorted((each for each in found if each[1] > 0.1), key=lambda each: -each[1])[:count]
