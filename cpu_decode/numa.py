"""Which processors and which memory belong together, as sysfs tells it, and on which nodes workers run.

Formats: Linux ``Documentation/ABI/stable/sysfs-devices-node`` and ``Documentation/admin-guide/cputopology.rst``. Pure
reading and choosing; ``cpu_decode/binding.py`` acts on it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import structlog

from transfer.config import NumaSetting
from transfer.errors import ConfigError

log = structlog.get_logger()

SYSFS = Path("/sys/devices/system")
STATUS = Path("/proc/self/status")
# What the kernel gives up at once when a process asks for memory: unused pages, clean or cheap caches.
_RECLAIMABLE = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")


class Node(NamedTuple):
    """One NUMA node, as far as this process may use it.

    ``cores`` holds the processors (hardware threads) of each physical core, both in ascending order; hidden ones are
    left out. ``available_bytes`` is memory that is unused or given up on demand. ``distances`` is by node number,
    10 for the node itself.
    """

    number: int
    cores: tuple[tuple[int, ...], ...]
    total_bytes: int
    available_bytes: int
    distances: dict[int, int]

    @property
    def cpus(self) -> tuple[int, ...]:
        """All its processors that this process may use."""
        return tuple(sorted(cpu for core in self.cores for cpu in core))

    @property
    def first_cpus(self) -> tuple[int, ...]:
        """One processor of each core: siblings share what decoding waits for, the way to memory."""
        return tuple(core[0] for core in self.cores)

    @property
    def hosts_workers(self) -> bool:
        """Whether it has both cores and memory for this process."""
        return bool(self.cores and self.total_bytes)


def read_topology(sysfs: Path = SYSFS, status: Path = STATUS, cpus: Collection[int] | None = None) -> tuple[Node, ...]:
    """The host's online nodes by number; none on a kernel without NUMA.

    ``cpus`` are the processors that this process may use (its affinity, which a cpuset narrows), ``status`` says on
    which nodes it may have memory.
    """
    allowed = os.sched_getaffinity(0) if cpus is None else set(cpus)
    folders = sorted(sysfs.glob("node/node[0-9]*"), key=lambda folder: int(folder.name.removeprefix("node")))
    numbers = [int(folder.name.removeprefix("node")) for folder in folders]
    with_memory = _memory_nodes(status, numbers)
    nodes = []
    for number, folder in zip(numbers, folders, strict=True):
        memory = _memory_bytes(folder / "meminfo") if number in with_memory else {}
        # One distance for each online node, in their order: numbers may have gaps.
        distances = map(int, (folder / "distance").read_text().split())
        nodes.append(
            Node(
                number,
                cores(set(parse_list((folder / "cpulist").read_text())) & allowed, sysfs),
                memory.get("MemTotal", 0),
                sum(memory.get(name, 0) for name in _RECLAIMABLE),
                dict(zip(numbers, distances, strict=True)),
            )
        )
    return tuple(nodes)


def cores(cpus: Collection[int], sysfs: Path = SYSFS) -> tuple[tuple[int, ...], ...]:
    """``cpus`` by the physical core that they share; one that says nothing about siblings counts as a core."""
    found: dict[tuple[int, ...], list[int]] = {}
    for cpu in sorted(cpus):
        siblings = sysfs / f"cpu/cpu{cpu}/topology/thread_siblings_list"
        core = tuple(parse_list(siblings.read_text())) if siblings.exists() else (cpu,)
        found.setdefault(core, []).append(cpu)
    return tuple(map(tuple, found.values()))


def choose(setting: NumaSetting, nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The nodes to run one bound worker on each; none: one worker that roams, as the kernel sees fit.

    ``auto`` takes every node with cores and memory, and binds nothing where the host has one node only. Raises
    :class:`ConfigError` for a node that cannot host a worker.
    """
    if setting == "off":
        return ()
    hosts = tuple(node for node in nodes if node.hosts_workers)
    if setting == "auto":
        for node in nodes:
            if len(nodes) > 1 and not node.hosts_workers:
                log.warning("no decode worker on this NUMA node", node=node.number, reason=_lack(node, nodes))
        return hosts if len(nodes) > 1 else ()
    found = next((node for node in nodes if node.number == setting), None)
    if found in hosts:
        return (found,)
    reason = _lack(found, nodes) if found else "this host has no such node"
    names = ", ".join(str(node.number) for node in hosts) or "none"
    raise ConfigError(f"NUMA node {setting} cannot host a decode worker: {reason}; nodes that can: {names}")


def filled(nodes: Sequence[Node], threads: int, batch_threads: int) -> Node | None:
    """The host's only node, if an unbound worker computes on every core of it; 0 threads: one a core.

    To pin its threads costs nothing then, for there is no other core to go to. Left to the kernel, a thread that wakes
    while something else runs on its core comes to share one with another that computes, for as long as 30 ms.
    """
    if len(nodes) != 1 or any(count not in (0, len(nodes[0].cores)) for count in (threads, batch_threads)):
        return None
    return nodes[0]


def compute_cpus(node: Node, threads: int) -> tuple[int, ...]:
    """The processors to pin ``threads`` threads to: a core each while there are any, then siblings; 0: every core.

    Raises :class:`ConfigError` if the node has fewer processors.
    """
    if threads > len(node.cpus):
        raise ConfigError(
            f"{threads} threads are asked for in [decode], NUMA node {node.number} has {len(node.cpus)} processors that"
            " this process may use; lower it, or set it to 0 for one thread a core"
        )
    siblings = tuple(cpu for cpu in node.cpus if cpu not in node.first_cpus)
    return (node.first_cpus + siblings)[: threads or len(node.cores)]


def require_room(node: Node, needed_bytes: int) -> None:
    """Refuse a node on which ``needed_bytes`` cannot be had: bound memory that runs out kills the process."""
    if needed_bytes > node.available_bytes:
        raise ConfigError(
            f"weights, cells and landing buffers need {needed_bytes >> 20} MiB, NUMA node {node.number} has"
            f" {node.available_bytes >> 20} MiB left; lower [decode] num_cells or landing_mib, or set numa to off"
        )


def remote_fraction(numa_maps: str, node: int) -> float:
    """The share of a process's own memory that lies on other nodes than ``node``.

    ``numa_maps`` is the text of ``/proc/PID/numa_maps`` (``man 7 numa``). Mapped files are left out: their pages are
    the page cache's, which every process on the host shares.
    """
    local = everywhere = 0
    for line in numa_maps.splitlines():
        if " file=" in line and " anon=" not in line:
            continue
        size = int(found[1]) if (found := re.search(r" kernelpagesize_kB=(\d+)", line)) else 4
        for number, pages in re.findall(r" N(\d+)=(\d+)", line):
            everywhere += size * int(pages)
            local += size * int(pages) * (int(number) == node)
    return 1 - local / everywhere if everywhere else 0.0


def parse_list(text: str) -> list[int]:
    """The numbers of a kernel list such as ``0-3,8``; an empty one has none."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            numbers += range(int(first), int(last or first) + 1)
    return numbers


def _memory_nodes(status: Path, numbers: Sequence[int]) -> set[int]:
    found = re.search(r"^Mems_allowed_list:\s*(\S*)$", status.read_text(), re.MULTILINE)
    return set(parse_list(found[1])) if found else set(numbers)


def _memory_bytes(meminfo: Path) -> dict[str, int]:
    """The fields of a node's meminfo, whose lines read ``Node 0 MemFree: 123 kB``."""
    return {
        name: int(kib) << 10 for name, kib in re.findall(r"^Node \d+ (\S+):\s+(\d+) kB$", meminfo.read_text(), re.M)
    }


def _lack(node: Node, nodes: Sequence[Node]) -> str:
    if not node.cores:
        return "it has no cores that this process may use"
    near = min((n for n in nodes if n.total_bytes), key=lambda n: node.distances[n.number], default=None)
    return "it has no memory for this process" + (f"; the nearest node with some is {near.number}" if near else "")
