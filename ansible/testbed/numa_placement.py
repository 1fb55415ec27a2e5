"""Where each decode worker of this host runs and lies, read from /proc and systemd; ends with 1 if anything strays.

Run as root on the host: ``numa_placement.py WEIGHTS_BYTES NODE...``. Formats: ``man 5 proc``, ``man 7 numa``. It
shares no code with the worker, which watches itself.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

MIB = 1 << 20
# libc, Python and the loader touch a few pages before anybody can bind them.
MAX_STRAY_SHARE = 0.01
LARGE_BYTES = 16 * MIB
UNIT_PROPERTIES = ("MainPID", "NUMAPolicy", "NUMAMask", "CPUAffinityFromNUMA", "LimitMEMLOCK")


class Mapping(NamedTuple):
    """One line of numa_maps: its name, and its bytes by node. ``own`` is false for pages of the page cache."""

    name: str
    own: bool
    bytes_by_node: dict[int, int]

    @property
    def size_bytes(self) -> int:
        """What of it is in memory."""
        return sum(self.bytes_by_node.values())


class Worker(NamedTuple):
    """What the kernel says of one process. ``thread_cpus`` are the processors that each thread may use."""

    thread_cpus: dict[int, set[int]]
    mappings: list[Mapping]
    locked_bytes: int
    huge_bytes: int


def cpu_list(text: str) -> set[int]:
    """The numbers of a kernel list such as ``0-3,8``."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def mappings(numa_maps: str) -> Iterator[Mapping]:
    """The mappings of a process that have pages in memory."""
    for line in numa_maps.splitlines():
        page_kib = int(found[1]) if (found := re.search(r" kernelpagesize_kB=(\d+)", line)) else 4
        pages = {int(node): int(count) * page_kib << 10 for node, count in re.findall(r" N(\d+)=(\d+)", line)}
        if pages:
            named = re.search(r" file=(\S+)", line)
            own = not named or " anon=" in line
            yield Mapping(Path(named[1]).name if named else "anonymous", own, pages)


def strays(worker: Worker, node: int, cpus: set[int], weights_bytes: int) -> list[str]:
    """What of ``worker`` is not as it has to be on ``node`` with ``cpus``, a sentence each; none if all is well."""
    found = []
    if outside := [task for task, allowed in worker.thread_cpus.items() if not allowed <= cpus]:
        found.append(f"{len(outside)} of {len(worker.thread_cpus)} threads may leave the node's processors")
    by_node = sizes(each for each in worker.mappings if each.own)
    total_bytes = by_node.total()
    if not total_bytes or 1 - by_node[node] / total_bytes > MAX_STRAY_SHARE:
        found.append(f"of {total_bytes / MIB:.1f} MiB only {by_node[node] / MIB:.1f} lie on node {node}")
    if by_node[node] < weights_bytes:
        found.append(f"the weights' {weights_bytes / MIB:.1f} MiB are not on node {node}")
    if worker.locked_bytes < weights_bytes:
        found.append(f"{worker.locked_bytes / MIB:.1f} MiB are locked, the weights have {weights_bytes / MIB:.1f}")
    if not worker.huge_bytes:
        found.append("nothing of it lies in huge pages")
    return found


def sizes(of: Iterable[Mapping]) -> Counter[int]:
    """Bytes by node."""
    total: Counter[int] = Counter()
    for each in of:
        total.update(each.bytes_by_node)
    return total


def read(pid: int) -> Worker:
    """The process ``pid``."""
    proc = Path(f"/proc/{pid}")
    tasks = {int(task.name): (task / "status").read_text() for task in (proc / "task").iterdir()}
    return Worker(
        {task: cpu_list(_field(status, "Cpus_allowed_list")) for task, status in tasks.items()},
        list(mappings((proc / "numa_maps").read_text())),
        int(_field((proc / "status").read_text(), "VmLck").split()[0]) << 10,
        int(_field((proc / "smaps_rollup").read_text(), "AnonHugePages").split()[0]) << 10,
    )


def unit(name: str) -> dict[str, str]:
    """What systemd holds of ``name``."""
    command = ["systemctl", "show", *(f"--property={each}" for each in UNIT_PROPERTIES), name]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 ours
    return dict(line.split("=", 1) for line in shown.splitlines())


def unit_strays(shown: dict[str, str], node: int) -> list[str]:
    """What systemd was told otherwise than the role promises."""
    wanted = {
        "NUMAPolicy": "bind",
        "NUMAMask": str(node),
        "CPUAffinityFromNUMA": "yes",
        "LimitMEMLOCK": "infinity",
    }
    return [f"{name} is {shown.get(name)}, not {value}" for name, value in wanted.items() if shown.get(name) != value]


def report(weights_bytes: int, nodes: list[int]) -> tuple[list[str], list[str]]:
    """Lines that say where everything is, and a sentence for each thing that strays."""
    balancing = Path("/proc/sys/kernel/numa_balancing").read_text().strip()
    lines = [f"NUMA balancing: {balancing}"]
    found = [] if balancing == "0" else ["NUMA balancing is on"]
    for node in nodes:
        name = f"isthmus-decode@{node}.service"
        cpus = cpu_list(Path(f"/sys/devices/system/node/node{node}/cpulist").read_text())
        shown = unit(name)
        worker = read(int(shown.pop("MainPID")))
        allowed = sorted(set().union(*worker.thread_cpus.values()))
        lines += [
            f"{name}: {' '.join(f'{key}={value}' for key, value in shown.items())}",
            f"  {len(worker.thread_cpus)} threads on processors {allowed}; node {node} has {sorted(cpus)}",
            f"  own memory: {_mib(sizes(each for each in worker.mappings if each.own))}",
            f"  page cache: {_mib(sizes(each for each in worker.mappings if not each.own))}",
        ]
        by_size = sorted(worker.mappings, key=lambda each: each.size_bytes, reverse=True)
        lines += [
            f"    {each.name}: {_mib(each.bytes_by_node)}"
            for each in by_size
            if each.own and each.size_bytes >= LARGE_BYTES
        ]
        lines.append(f"  locked: {worker.locked_bytes / MIB:.1f} MiB; in huge pages: {worker.huge_bytes / MIB:.1f} MiB")
        found += [f"{name}: {each}" for each in [*unit_strays(shown, node), *strays(worker, node, cpus, weights_bytes)]]
    return lines, found


def _field(text: str, name: str) -> str:
    found = re.search(rf"^{name}:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else "0"


def _mib(by_node: dict[int, int]) -> str:
    return ", ".join(f"{size / MIB:.1f} MiB on node {node}" for node, size in sorted(by_node.items())) or "none"


if __name__ == "__main__":
    seen, strayed = report(int(sys.argv[1]), [int(each) for each in sys.argv[2:]])
    sys.stdout.write("\n".join([*seen, *(f"STRAY: {each}" for each in strayed)]) + "\n")
    sys.exit(1 if strayed else 0)
