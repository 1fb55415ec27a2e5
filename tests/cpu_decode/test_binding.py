"""Binding, read back from the kernel: in a thread of its own, and in a real worker process."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

from cpu_decode import binding, numa
from isthmus.up import cluster_on_free_ports, with_keys
from tests.cpu_decode.worker_client import WorkerClient
from transfer import keys
from transfer.config import Pair, dump
from transfer.errors import ConfigError
from transfer.messages import Sampling

NODES = numa.read_topology()
HUGE_PAGES = "[never]" not in binding.THP.read_text()
needs_nodes = pytest.mark.skipif(not NODES, reason="this kernel has no NUMA nodes")


# x86-64 number and linux/mempolicy.h; the kernel's mask has room for 1,024 nodes.
SYS_GET_MEMPOLICY = 239
MPOL_DEFAULT, MPOL_BIND = 0, 2
NODE_MASK = ctypes.c_ulong * 16


def memory_policy() -> tuple[int, list[int]]:
    """The calling thread's memory policy (``MPOL_...``) and the nodes it names."""
    libc = ctypes.CDLL(None, use_errno=True)
    mode, mask = ctypes.c_int(), NODE_MASK()
    assert libc.syscall(SYS_GET_MEMPOLICY, ctypes.byref(mode), mask, ctypes.c_ulong(1024), None, 0) == 0
    return mode.value, [number for number in range(1024) if mask[number // 64] >> number % 64 & 1]


@dataclass
class Started:
    """A worker process that is ready, what it logged until then, and a client."""

    pid: int
    log: list[dict[str, Any]]
    client: WorkerClient

    def logged(self, event: str) -> dict[str, Any]:
        return next(entry for entry in self.log if entry["event"] == event)

    def affinities(self) -> dict[int, set[int]]:
        """By thread."""
        return {thread.id: os.sched_getaffinity(thread.id) for thread in psutil.Process(self.pid).threads()}

    def policy(self, thread: int) -> str:
        """The memory policy of a thread, by which it fills the heap."""
        maps = Path(f"/proc/{self.pid}/task/{thread}/numa_maps").read_text()
        return next(line.split()[1] for line in maps.splitlines() if " heap" in line)


@contextmanager
def worker(default_pair, folder: Path, *arguments: str, **settings: object) -> Iterator[Started]:
    pair = Pair(name=default_pair.name, hf_dir=str(default_pair.hf_dir), gguf=str(default_pair.gguf))
    cluster = with_keys(cluster_on_free_ports(pair), folder / "keys")
    decode = msgspec.structs.replace(cluster.decode, num_cells=4096, landing_mib=64, speculate="off", **settings)
    config = folder / "isthmus.toml"
    config.write_bytes(dump(msgspec.structs.replace(cluster, decode=decode)))
    command = [sys.executable, "-P", "-m", "isthmus", "decode", "--config", str(config), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            log = []
            for line in process.stderr:
                log.append(json.loads(line))
                if log[-1]["event"] == "decode worker is ready":
                    break
            assert process.poll() is None, log
            client = WorkerClient(decode.control_port, keys.client(folder / "keys", "proxy"))
            with closing(client):
                yield Started(process.pid, log, client)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


def has_decoded(started: Started) -> bool:
    """Whether it has: threads are pinned when they first compute."""
    ticket = started.client.reserve([1, 2, 3], Sampling(max_tokens=4, ignore_eos=True), "local")
    started.client.start(ticket)
    return len(started.client.collect(ticket)[0]) == 4


def in_a_thread(body: Callable[[], Any]) -> Any:
    """What ``body`` returns in a thread of its own: a memory policy is a thread's."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(body()))
    thread.start()
    thread.join(10)
    return results[0]


@needs_nodes
def test_a_bound_worker_stays_on_its_node_with_a_core_for_each_computing_thread(default_pair, tmp_path: Path) -> None:
    node = next(node for node in NODES if node.hosts_workers)
    with worker(default_pair, tmp_path, "--numa-node", str(node.number)) as started:
        assert has_decoded(started)
        affinities = started.affinities()
        assert all(cpus <= set(node.cpus) for cpus in affinities.values())
        pinned = {thread: min(cpus) for thread, cpus in affinities.items() if len(cpus) == 1}
        if len(node.cores) > 1:
            assert sorted(pinned.values()) == sorted(node.first_cpus)
        assert {started.policy(thread) for thread in (started.pid, *pinned)} == {f"bind:{node.number}"}
        assert started.client.status().remote_memory_fraction <= binding.MAX_REMOTE_FRACTION
        assert started.logged("model loaded")["cpus"] == list(node.first_cpus)
        assert started.logged("memory outside the worker's NUMA node")["level"] == "info"


@pytest.mark.skipif(len(NODES) > 1, reason="on several nodes auto binds")
@pytest.mark.parametrize("setting", ["auto", "off"])
def test_a_worker_on_a_host_of_one_node_roams_but_for_threads_that_take_every_core(
    default_pair, tmp_path: Path, setting: str
) -> None:
    with worker(default_pair, tmp_path, "--numa-node", setting) as started:
        assert has_decoded(started)
        affinities = started.affinities()
        usable = os.sched_getaffinity(0)
        pinned = {thread: min(cpus) for thread, cpus in affinities.items() if cpus != usable}
        first_cpus = [min(core) for core in numa.cores(usable)] if NODES and setting == "auto" else []
        if len(usable) > 1:
            assert sorted(pinned.values()) == first_cpus
        assert {started.policy(thread) for thread in affinities} == {"default"}
        assert started.logged("model loaded")["numa_node"] is None
        assert started.logged("model loaded")["cpus"] == (first_cpus or None)


@pytest.mark.skipif(len(NODES) > 1, reason="on several nodes auto binds")
def test_threads_that_are_not_one_for_each_core_roam(default_pair, tmp_path: Path) -> None:
    with worker(default_pair, tmp_path, threads=len(numa.cores(os.sched_getaffinity(0))) + 1) as started:
        assert has_decoded(started)
        assert {frozenset(cpus) for cpus in started.affinities().values()} == {frozenset(os.sched_getaffinity(0))}


@pytest.mark.skipif(not HUGE_PAGES, reason="huge pages are switched off on this host")
def test_cells_lie_in_huge_pages_if_asked_for(default_pair, tmp_path: Path) -> None:
    def huge_bytes(pid: int) -> int:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages:"))

    with worker(default_pair, tmp_path, huge_pages=False) as started:
        without = huge_bytes(started.pid)
    with worker(default_pair, tmp_path, huge_pages=True) as started:
        # 4,096 cells of SmolLM2 take 90 MiB.
        assert huge_bytes(started.pid) - without > 64 << 20


@needs_nodes
def test_binding_is_read_back_as_it_was_set() -> None:
    node = next(node for node in NODES if node.hosts_workers)
    before = os.sched_getaffinity(0)

    def bound() -> tuple[int, list[int]]:
        binding.bind(node)
        return memory_policy()

    try:
        assert in_a_thread(bound) == (MPOL_BIND, [node.number])
        assert os.sched_getaffinity(0) == set(node.cpus)
        assert in_a_thread(memory_policy) == (MPOL_DEFAULT, [])
    finally:
        os.sched_setaffinity(0, before)


@needs_nodes
def test_a_node_whose_memory_the_kernel_refuses_is_named() -> None:
    nowhere = NODES[0]._replace(number=1000)
    with pytest.raises(ConfigError, match=r"memory cannot be bound to NUMA node 1000 \(Invalid argument\)"):
        binding.bind(nowhere)


@pytest.mark.skipif(not HUGE_PAGES, reason="huge pages are switched off on this host")
def test_moving_to_huge_pages_keeps_what_is_there() -> None:
    values = np.random.default_rng(0).integers(0, 256, 64 << 20, np.uint8)
    before = values.copy()
    assert binding.take_huge_pages() >= values.nbytes
    np.testing.assert_array_equal(values, before)


def test_only_large_private_memory_is_moved() -> None:
    maps = """7f0000100000-7f0004000000 rw-p 00000000 00:00 0
7f1000000000-7f1000f00000 rw-p 00000000 00:00 0
7f2000000000-7f2004000000 r--p 00000000 08:01 131 /models/model.gguf
7f3000000000-7f3004000000 rw-s 00000000 00:01 17 /memfd:x (deleted)
7f4000000000-7f4004000000 r-xp 00000000 00:00 0
55d000000000-55d004000001 rw-p 00000000 00:00 0 [heap]
"""
    assert binding._large_mappings(maps) == [(0x7F0000200000, 0x7F0004000000), (0x55D000000000, 0x55D004000000)]


def test_locked_memory_is_the_kernels_figure() -> None:
    assert binding.locked_bytes() % 1024 == 0
