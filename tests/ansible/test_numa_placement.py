from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

PLACEMENT = runpy.run_path(str(Path(__file__).parents[2] / "ansible" / "testbed" / "numa_placement.py"))
MIB = 1 << 20
WEIGHTS_BYTES = 92 * MIB
# Weights, cells in huge pages of 2 MiB, a heap, a library's text and its relocated data.
NUMA_MAPS = """
7f0000000000 bind:1 anon=23552 dirty=23552 N1=23552 kernelpagesize_kB=4
7f1000000000 bind:1 anon=12 dirty=12 N1=12 kernelpagesize_kB=2048
55d000000000 bind:1 heap anon=1000 dirty=1000 N1=990 N0=10 kernelpagesize_kB=4
7f2000000000 bind:1 file=/usr/lib/libc.so.6 mapped=300 mapmax=9 N0=300 kernelpagesize_kB=4
7f2000200000 bind:1 file=/usr/lib/libc.so.6 anon=4 dirty=4 N1=4 kernelpagesize_kB=4
7f3000000000 bind:1
"""


def worker(**changed: Any) -> Any:
    fields = {
        "thread_cpus": {10: {2, 3}, 11: {2}},
        "mappings": list(PLACEMENT["mappings"](NUMA_MAPS)),
        "locked_bytes": WEIGHTS_BYTES,
        "huge_bytes": 24 * MIB,
    }
    return PLACEMENT["Worker"](**(fields | changed))


def strays(of: Any, node: int = 1) -> list[str]:
    found: list[str] = PLACEMENT["strays"](of, node, {0, 1} if node == 0 else {2, 3}, WEIGHTS_BYTES)
    return found


def test_a_worker_on_its_node_has_nothing_astray() -> None:
    assert strays(worker()) == []


def test_pages_are_counted_by_their_size_and_the_page_cache_is_nobodys() -> None:
    own = PLACEMENT["sizes"](each for each in worker().mappings if each.own)
    assert own == {0: 10 * 4096, 1: 23552 * 4096 + 12 * 2 * MIB + 994 * 4096}


def test_the_other_node_is_told_of_threads_and_pages() -> None:
    told = strays(worker(), node=0)
    assert [sentence.split()[0] for sentence in told] == ["2", "of", "the"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"thread_cpus": {10: {2, 3}, 11: {1, 2}}}, "1 of 2 threads may leave the node's processors"),
        ({"locked_bytes": 8 * MIB}, "8.0 MiB are locked, the weights have 92.0"),
        ({"huge_bytes": 0}, "nothing of it lies in huge pages"),
    ],
)
def test_each_thing_astray_is_told(changed: dict[str, Any], said: str) -> None:
    assert strays(worker(**changed)) == [said]


def test_a_unit_that_systemd_binds_elsewhere_is_told() -> None:
    shown = {"NUMAPolicy": "bind", "NUMAMask": "0", "CPUAffinityFromNUMA": "yes", "LimitMEMLOCK": "8388608"}
    assert PLACEMENT["unit_strays"](shown, 1) == ["NUMAMask is 0, not 1", "LimitMEMLOCK is 8388608, not infinity"]
