"""Topology and choices on recorded hosts; the real binding is in test_binding.py."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cpu_decode import numa
from tests.cpu_decode import sysfs
from transfer.errors import ConfigError

GIB = 1 << 30


def host(name: str, folder: Path, cpus: Collection[int] = range(256), mems: str = "0-255") -> tuple[numa.Node, ...]:
    """A recorded host, as a process sees it that may use ``cpus`` and the memory of ``mems``."""
    status = folder / "status"
    status.write_text(f"Name:\tpython\nMems_allowed:\tff\nMems_allowed_list:\t{mems}\nvoluntary_ctxt_switches:\t1\n")
    return numa.read_topology(sysfs.unpack(name, folder), status, cpus)


def test_one_node_with_siblings_side_by_side(tmp_path: Path) -> None:
    (node,) = host("one_node", tmp_path)
    assert node.cores == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert (node.number, node.total_bytes, node.available_bytes) == (0, 16 * GIB, 11.25 * GIB)
    assert node.distances == {0: 10}


def test_two_sockets_with_smt(tmp_path: Path) -> None:
    first, second = host("dual_e5_2680v4", tmp_path)
    assert first.first_cpus == tuple(range(14))
    assert second.first_cpus == tuple(range(14, 28))
    assert first.cores[0] == (0, 28) and second.cores[-1] == (27, 55)
    assert first.cpus == (*range(14), *range(28, 42))
    assert (first.distances, second.distances) == ({0: 10, 1: 21}, {0: 21, 1: 10})


def test_sub_numa_clusters_are_nodes_like_others(tmp_path: Path) -> None:
    nodes = host("four_nodes_snc", tmp_path)
    assert [node.first_cpus for node in nodes] == [tuple(range(8 * n, 8 * n + 8)) for n in range(4)]
    assert nodes[0].distances == {0: 10, 1: 12, 2: 21, 3: 21}


def test_distances_go_by_number_where_numbers_have_gaps(tmp_path: Path) -> None:
    nodes = host("sparse_ids", tmp_path)
    assert [node.number for node in nodes] == [0, 8, 252]
    assert nodes[1].distances == {0: 40, 8: 10, 252: 80}
    assert nodes[1].cores == ((80, 81, 82, 83),)
    assert nodes[2].cores == ()


def test_a_cpuset_hides_cores_and_single_siblings(tmp_path: Path) -> None:
    first, second = host("dual_e5_2680v4", tmp_path, cpus={3, 31, 4, 50})
    assert first.cores == ((3, 31), (4,))
    assert second.cores == ((50,),)
    assert second.first_cpus == (50,)


def test_a_cpuset_hides_memory(tmp_path: Path) -> None:
    nodes = host("dual_e5_2680v4", tmp_path, mems="1")
    assert [node.hosts_workers for node in nodes] == [False, True]


def test_a_kernel_without_numa_has_no_nodes(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\n")
    assert numa.read_topology(tmp_path, status, {0}) == ()
    assert numa.choose("auto", ()) == ()
    with pytest.raises(ConfigError, match=r"NUMA node 0 cannot host .* no such node; nodes that can: none"):
        numa.choose(0, ())


def test_auto_binds_nothing_on_one_node_and_every_node_that_can_on_several(tmp_path: Path) -> None:
    def chosen(name: str, **seen: str) -> list[int]:
        return [node.number for node in numa.choose("auto", host(name, tmp_path / name, **seen))]

    for name in ("one_node", "dual_e5_2680v4", "four_nodes_snc", "memoryless_node", "sparse_ids"):
        (tmp_path / name).mkdir()
    assert chosen("one_node") == []
    assert chosen("dual_e5_2680v4") == [0, 1]
    assert chosen("four_nodes_snc") == [0, 1, 2, 3]
    assert chosen("memoryless_node") == [1, 2]
    assert chosen("sparse_ids") == [0, 8]
    assert chosen("dual_e5_2680v4", mems="1") == [1]


def test_auto_says_which_nodes_stay_without_a_worker(tmp_path: Path) -> None:
    with capture_logs() as logs:
        numa.choose("auto", host("memoryless_node", tmp_path))
    assert [(entry["node"], entry["reason"]) for entry in logs] == [
        (0, "it has no memory for this process; the nearest node with some is 2")
    ]


def test_off_binds_nothing(tmp_path: Path) -> None:
    assert numa.choose("off", host("four_nodes_snc", tmp_path)) == ()


def test_one_node_is_chosen_by_number(tmp_path: Path) -> None:
    nodes = host("sparse_ids", tmp_path)
    assert numa.choose(8, nodes) == (nodes[1],)


@pytest.mark.parametrize(
    ("name", "number", "reason"),
    [
        ("dual_e5_2680v4", 2, "this host has no such node; nodes that can: 0, 1"),
        ("memoryless_node", 0, "no memory for this process; the nearest node with some is 2; nodes that can: 1, 2"),
        ("sparse_ids", 252, "no cores that this process may use; nodes that can: 0, 8"),
    ],
)
def test_a_node_that_cannot_host_a_worker_is_refused_with_those_that_can(
    tmp_path: Path, name: str, number: int, reason: str
) -> None:
    with pytest.raises(ConfigError, match=rf"NUMA node {number} cannot host a decode worker: .*{reason}"):
        numa.choose(number, host(name, tmp_path))


def test_threads_go_to_one_processor_of_each_core(tmp_path: Path) -> None:
    _, second = host("dual_e5_2680v4", tmp_path)
    assert numa.compute_cpus(second, 0) == tuple(range(14, 28))
    assert numa.compute_cpus(second, 4) == (14, 15, 16, 17)
    assert numa.compute_cpus(second, 15) == (*range(14, 28), 42)
    with pytest.raises(ConfigError, match=r"29 threads are asked for .* NUMA node 1 has 28 processors"):
        numa.compute_cpus(second, 29)


def test_a_host_is_filled_by_a_thread_for_each_core_of_its_only_node(tmp_path: Path) -> None:
    nodes = host("one_node", tmp_path)
    assert [numa.filled(nodes, *threads) for threads in ((0, 0), (4, 0), (0, 4), (4, 4))] == [nodes[0]] * 4
    assert [numa.filled(nodes, *threads) for threads in ((3, 0), (8, 0), (0, 8), (4, 2))] == [None] * 4
    (tmp_path / "two").mkdir()
    assert numa.filled(host("dual_e5_2680v4", tmp_path / "two"), 0, 0) is None
    assert numa.filled((), 0, 0) is None


def test_a_model_that_does_not_fit_its_node_is_refused(tmp_path: Path) -> None:
    _, second = host("dual_e5_2680v4", tmp_path)
    numa.require_room(second, 29 * GIB)
    with pytest.raises(
        ConfigError, match=r"need 30720 MiB, NUMA node 1 has 29696 MiB left; lower \[decode\] num_cells"
    ):
        numa.require_room(second, 30 * GIB)


def test_remote_share_counts_bytes_and_leaves_mapped_files_out() -> None:
    maps = """7f0000000000 bind:1 anon=300 dirty=300 N0=75 N1=225 kernelpagesize_kB=4
7f1000000000 bind:1 anon=2 dirty=2 N1=2 kernelpagesize_kB=2048
7f2000000000 default file=/lib/libc.so.6 mapped=400 N0=400 kernelpagesize_kB=4
7f3000000000 bind:1 file=/lib/libc.so.6 anon=4 dirty=4 N0=1 N1=3 kernelpagesize_kB=4
7f4000000000 default
"""
    local, remote = 225 * 4 + 2 * 2048 + 3 * 4, 75 * 4 + 4
    assert numa.remote_fraction(maps, 1) == pytest.approx(remote / (local + remote))
    assert numa.remote_fraction(maps, 0) == pytest.approx(local / (local + remote))
    assert numa.remote_fraction("", 0) == 0.0


@given(st.sets(st.integers(0, 300)))
def test_kernel_lists_parse(numbers: set[int]) -> None:
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    text = ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in ranges) + "\n"
    assert numa.parse_list(text) == sorted(numbers)
