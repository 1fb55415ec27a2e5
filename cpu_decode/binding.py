"""Ties this process to a NUMA node, in one place: processors, memory policy, huge pages.

The memory policy is two raw system calls: the bindings on PyPI are unmaintained and want libnuma on every host.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections import Counter
from pathlib import Path

import structlog

from cpu_decode.numa import Node, remote_fraction
from transfer.errors import ConfigError

log = structlog.get_logger()

# x86-64 number and linux/mempolicy.h.
_SYS_SET_MEMPOLICY = 238
_MPOL_BIND = 2
# The kernel's largest number of nodes on x86-64, and one more bit, for it takes the last one off.
_MAX_NODES = 1024
_MASK = ctypes.c_ulong * (_MAX_NODES // 64)
MADV_COLLAPSE = 25  # linux/mman.h, since Linux 6.1
HUGE_PAGE_BYTES = 2 << 20
# Smaller mappings are stacks and heaps; weights, cells and buffers that decoding reads all the time are larger.
LARGE_MAPPING_BYTES = 16 << 20
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
WATCH_S = 60.0
MAX_REMOTE_FRACTION = 0.05

_libc = ctypes.CDLL(None, use_errno=True)


def bind(node: Node) -> None:
    """Let this process, and all threads it starts from now on, run on ``node``'s processors and take its memory only.

    Call it before anything large is allocated and before an OpenMP runtime is loaded, which counts processors then.
    Raises :class:`ConfigError` if the kernel refuses.
    """
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), node.cpus)
    mask = _MASK()
    mask[node.number // 64] = 1 << node.number % 64
    if _libc.syscall(_SYS_SET_MEMPOLICY, _MPOL_BIND, mask, ctypes.c_ulong(_MAX_NODES + 1)):
        reason = os.strerror(ctypes.get_errno())
        raise ConfigError(f"memory cannot be bound to NUMA node {node.number} ({reason}); set [decode] numa to off")


def take_huge_pages() -> int:
    """Move what is allocated in large pieces to huge pages; returns the bytes moved, and says in the log why not.

    Takes about a second a GB, once. What is not touched yet will be huge when it is.
    """
    if "[never]" in THP.read_text():
        log.info("no huge pages: they are switched off on this host", file=str(THP))
        return 0
    moved = 0
    failures: Counter[int] = Counter()
    for start, end in _large_mappings(Path("/proc/self/maps").read_text()):
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
        # One by one: the kernel gives a range up at the first page in it that was never touched (EINVAL).
        for page in range(start, end, HUGE_PAGE_BYTES):
            if _libc.madvise(ctypes.c_void_p(page), ctypes.c_size_t(HUGE_PAGE_BYTES), MADV_COLLAPSE):
                failures[ctypes.get_errno()] += 1
            else:
                moved += HUGE_PAGE_BYTES
    del failures[errno.EINVAL]
    for reason, pages in failures.items():
        log.info("memory that stays in small pages", mib=pages * HUGE_PAGE_BYTES >> 20, reason=os.strerror(reason))
    return moved


def _large_mappings(maps: str) -> list[tuple[int, int]]:
    """Address ranges, whole huge pages, of writable memory without a file (``man 5 proc_pid_maps``)."""
    ranges = []
    for line in maps.splitlines():
        addresses, permissions, _offset, _device, inode, *_ = line.split()
        start, end = (int(address, 16) for address in addresses.split("-"))
        start, end = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, end // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if permissions == "rw-p" and inode == "0" and end - start >= LARGE_MAPPING_BYTES:
            ranges.append((start, end))
    return ranges


class MemoryWatch:
    """Measures once a minute, in a thread of its own, how much of this process's memory is remote to ``node``.

    Reading numa_maps walks every page table: too slow for a thread that streams tokens.
    """

    def __init__(self, node: int) -> None:
        self._node = node
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="isthmus-numa", daemon=True)
        self.remote_fraction = 0.0

    def start(self) -> None:
        """Measure now, warn if more than ``MAX_REMOTE_FRACTION`` is remote, and go on measuring."""
        self._measure()
        say = log.warning if self.remote_fraction > MAX_REMOTE_FRACTION else log.info
        say("memory outside the worker's NUMA node", node=self._node, fraction=round(self.remote_fraction, 4))
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join()

    def _measure(self) -> None:
        self.remote_fraction = remote_fraction(Path("/proc/self/numa_maps").read_text(), self._node)

    def _run(self) -> None:
        while not self._stopping.wait(WATCH_S):
            self._measure()


def locked_bytes() -> int:
    """Memory of this process that cannot be swapped out."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmLck:"))
