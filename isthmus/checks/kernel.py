"""Settings of the kernel, and limits of this process. ``root`` is ``/``, or a folder that looks like it."""

from __future__ import annotations

import re
from pathlib import Path

from isthmus.checks.finding import Finding, gibibytes, text

# Bit of CAP_IPC_LOCK in CapEff, include/uapi/linux/capability.h: such a process may lock what it likes.
_CAP_IPC_LOCK = 14
# Read without leaving the process, and steady: Linux Documentation/virt/kvm/x86/timekeeping.rst.
_FAST_CLOCKS = ("tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter")


def numa_balancing(root: Path) -> Finding:
    """Whether the kernel moves pages between NUMA nodes on its own (Documentation/admin-guide/sysctl/kernel.rst)."""
    check, why = "NUMA balancing", "unmaps weights to see who uses them, and moves pages that are bound on purpose"
    nodes = len(list((root / "sys/devices/system/node").glob("node[0-9]*")))
    setting = text(root / "proc/sys/kernel/numa_balancing")
    if nodes < 2:
        return Finding(check, "ok", "one NUMA node", why)
    if setting is None:
        return Finding(check, "unknown", "the kernel does not say", why)
    if setting == "0":
        return Finding(check, "ok", f"off, {nodes} NUMA nodes", why)
    return Finding(check, "warn", f"on, {nodes} NUMA nodes", why, "sysctl -w kernel.numa_balancing=0")


def huge_pages(root: Path) -> Finding:
    """Whether a process may have transparent huge pages (Documentation/admin-guide/mm/transhuge.rst)."""
    check, why = "transparent huge pages", "decoding reads all weights for every token: 4 KiB pages miss the TLB"
    chosen = re.search(r"\[(\w+)\]", text(root / "sys/kernel/mm/transparent_hugepage/enabled") or "")
    if chosen is None:
        return Finding(check, "unknown", "the kernel does not say", why)
    if chosen[1] == "never":
        fix = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        return Finding(check, "warn", "never", why, fix)
    return Finding(check, "ok", chosen[1], why)


def locked_memory(root: Path, needed_bytes: int) -> Finding:
    """Whether ``needed_bytes`` may be locked in memory; 0 where nobody wants to."""
    check, why = "locked memory", "weights that are swapped out come back at the speed of a disk"
    limits, status = text(root / "proc/self/limits") or "", text(root / "proc/self/status") or ""
    hard = re.search(r"^Max locked memory +\S+ +(\S+)", limits, re.MULTILINE)
    capabilities = re.search(r"^CapEff:\s+([0-9a-f]+)", status, re.MULTILINE)
    if hard is None:
        return Finding(check, "unknown", "the kernel does not say", why)
    if capabilities and int(capabilities[1], 16) >> _CAP_IPC_LOCK & 1:
        return Finding(check, "ok", "this user may lock all memory; the service's user may have a limit", why)
    if hard[1] == "unlimited" or int(hard[1]) >= needed_bytes:
        return Finding(check, "ok", f"limit {hard[1]}", why)
    seen = f"limit {gibibytes(int(hard[1]))}, weights have {gibibytes(needed_bytes)}"
    return Finding(check, "warn", seen, why, "LimitMEMLOCK=infinity in the unit, or `ulimit -l unlimited` as root")


def swap(root: Path) -> Finding:
    """Whether pages are swapped out now."""
    check, why = "swap", "a step waits for the disk as soon as it touches a page that was swapped out"
    found = dict(re.findall(r"^(Swap\w+):\s+(\d+) kB$", text(root / "proc/meminfo") or "", re.MULTILINE))
    if not {"SwapTotal", "SwapFree"} <= found.keys():
        return Finding(check, "unknown", "the kernel does not say", why)
    used_bytes = (int(found["SwapTotal"]) - int(found["SwapFree"])) << 10
    if used_bytes == 0:
        return Finding(check, "ok", "none in use" if int(found["SwapTotal"]) else "there is none", why)
    return Finding(check, "warn", f"{gibibytes(used_bytes)} in use", why, "swapoff -a && swapon -a when memory is free")


def clock_source(root: Path) -> Finding:
    """What the monotonic clock is read from."""
    check, why = "clock source", "every stage of every request reads the clock; slow ones take a microsecond each time"
    folder = root / "sys/devices/system/clocksource/clocksource0"
    current, available = text(folder / "current_clocksource"), text(folder / "available_clocksource") or ""
    if current is None:
        return Finding(check, "unknown", "the kernel does not say", why)
    if current in _FAST_CLOCKS:
        return Finding(check, "ok", current, why)
    better = next((name for name in available.split() if name in _FAST_CLOCKS), None)
    fix = f"echo {better} > /{folder.relative_to(root)}/current_clocksource" if better else "boot with tsc=reliable"
    return Finding(check, "warn", current, why, fix)
