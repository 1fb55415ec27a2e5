"""Writing behind and reading ahead: bounded, off the caller's thread, and never longer than it is worth."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

from cpu_decode.pool import below
from cpu_decode.pool.below import Fetch, Fetched, LowerTiers, ReadRate
from cpu_decode.pool.block_log import BlockLog
from cpu_decode.pool.disk import DiskTier
from cpu_decode.pool.losses import Losses
from cpu_decode.pool.stored import Payload, StoredBlock
from tests.cpu_decode.pool.stored_blocks import SEED, block
from tests.cpu_decode.test_worker import eventually

LATER_NS = 10_000_000_000


class Scripted:
    """A tier that does what a real one cannot be made to do."""

    used_bytes = capacity_bytes = corrupt_blocks = 0

    def __init__(self, name: str = "shared") -> None:
        self.name = name
        self.blocks: dict[bytes, Payload] = {}
        self.losses = Losses()
        self.stalled = threading.Event()
        self.stalled.set()
        self.failing = False

    def __len__(self) -> int:
        return len(self.blocks)

    def load(self) -> None:
        pass

    def close(self) -> None:
        pass

    def holds(self, name: bytes) -> bool:
        return name in self.blocks

    def may_hold(self, name: bytes) -> bool:
        return bool(name)

    def get(self, names: Sequence[bytes]) -> list[Payload]:
        self.stalled.wait(10)
        if self.failing:
            raise RuntimeError("planned")
        got = []
        for name in names:
            if name not in self.blocks:
                break
            got.append(self.blocks[name])
        return got

    def put(self, block: StoredBlock) -> None:
        self.stalled.wait(10)
        if self.failing:
            raise RuntimeError("planned")
        self.blocks[block.name] = block.payload


@contextmanager
def started(*tiers, max_behind_bytes: int = 1 << 20) -> Iterator[tuple[LowerTiers, queue.SimpleQueue[Fetched]]]:
    lower, said = LowerTiers(tiers, max_behind_bytes), queue.SimpleQueue[Fetched]()
    lower.start(said.put)
    try:
        yield lower, said
    finally:
        for tier in tiers:
            if isinstance(tier, Scripted):
                tier.stalled.set()
        lower.close()


def names(*numbers: int) -> list[bytes]:
    return [block(number).name for number in numbers]


def job(*chains: list[bytes], tiers=("disk", "shared"), worth_ns: int = LATER_NS) -> Fetch:
    named = tuple((fidelity, chain) for fidelity, chain in zip(("", "q8"), chains, strict=False))
    return Fetch("r", named, tiers, time.monotonic_ns() + worth_ns)


def test_each_block_comes_from_the_first_tier_that_has_it(tmp_path):
    disk, shared = DiskTier(tmp_path, 1 << 20, SEED, BlockLog()), Scripted()
    for number in range(9, 20):
        shared.put(block(number))
    with started(disk, shared) as (lower, said):
        lower.keep(block(number) for number in range(9))
        eventually(lambda: len(disk) == 9 and len(shared) == 20)
        # The middle of the chain has been lost on disk, and 30 never was anywhere.
        disk.get(names(3))
        (tmp_path / "0" / block(3).name.hex()[:2] / f"{block(3).name.hex()[:32]}.kv").unlink()
        assert lower.fetch(job(names(*range(20), 30, 10)))
        fetched = said.get(timeout=5)
        assert [piece.tier for piece in fetched.pieces] == ["disk"] * 3 + ["shared"] * 8 + ["shared"] * 8 + ["shared"]
        assert all(np.array_equal(p.payload, block(n).payload) for n, p in enumerate(fetched.pieces))
        assert fetched.took_ns > 0
        lower.fetch(job(names(0, 1, 9), tiers=("disk",)))
        assert [piece.tier for piece in said.get(timeout=5).pieces] == ["disk", "disk"]


def test_lossy_blocks_follow_exact_ones():
    shared = Scripted()
    for number in (0, 1, 102, 103):
        shared.put(block(number))
    with started(shared) as (lower, said):
        lower.fetch(job(names(0, 1, 2, 3), names(100, 101, 102, 103)))
        assert [piece.fidelity for piece in said.get(timeout=5).pieces] == ["", "", "q8", "q8"]


def test_a_deadline_ends_a_fetch_with_what_has_come():
    shared = Scripted()
    for number in range(40):
        shared.put(block(number))
    plain = shared.get
    shared.get = lambda wanted: (time.sleep(0.05), plain(wanted))[1]  # type: ignore[method-assign]
    with started(shared) as (lower, said):
        lower.fetch(job(names(*range(40)), worth_ns=120_000_000))
        assert 8 <= len(said.get(timeout=5).pieces) < 40
        lower.fetch(job(names(*range(40)), worth_ns=-1))
        assert said.get(timeout=5).pieces == []


def test_a_tier_that_fails_in_an_unplanned_way_ends_nothing():
    shared = Scripted()
    shared.put(block(1))
    shared.failing = True
    with started(shared) as (lower, said):
        lower.fetch(job(names(1)))
        assert said.get(timeout=5).pieces == []
        lower.keep([block(2)])
        time.sleep(0.05)
        shared.failing = False
        lower.keep([block(3)])
        eventually(lambda: shared.holds(block(3).name))
        lower.fetch(job(names(1)))
        assert len(said.get(timeout=5).pieces) == 1


def test_what_waits_to_be_written_and_to_be_read_is_bounded(monkeypatch):
    monkeypatch.setattr(below, "MAX_FETCHES", 2)
    shared = Scripted()
    shared.stalled.clear()
    with started(shared, max_behind_bytes=3 * block(0).num_bytes) as (lower, said):
        lower.keep(block(number) for number in range(10))
        lower.keep(block(number) for number in range(10))
        lower.fetch(job(names(0)))
        eventually(lambda: not lower._jobs)
        assert [lower.fetch(job(names(0))) for _ in range(4)] == [True, True, False, False]
        shared.stalled.set()
        eventually(lambda: len(shared) == 3)
        assert [said.get(timeout=5).request_id for _ in range(3)] == ["r"] * 3
        (status,) = lower.status(lambda _: (0, 0))
        assert status.refused == {"behind": 14}
        lower.keep([block(7)])
        eventually(lambda: len(shared) == 4)


def test_the_end_waits_for_what_is_to_be_written():
    shared = Scripted()
    with started(shared) as (lower, _):
        shared.stalled.clear()
        lower.keep(block(number) for number in range(5))
        threading.Timer(0.2, shared.stalled.set).start()
    assert len(shared) == 5
    assert not lower.fetch(job(names(0)))


def test_a_tier_is_read_where_that_is_faster_than_computing():
    shared = Scripted()
    lower = LowerTiers([shared])
    # Nothing is known: it is tried.
    assert lower.paying(1_000_000, 1.0) == ("shared",)
    lower._rates["shared"].observe(1_000_000, 1_000_000)
    assert lower.paying(1_000_000, 999_000) == ()
    assert lower.paying(1_000_000, 1_001_000) == ("shared",)


def test_an_old_rate_is_measured_again(monkeypatch: pytest.MonkeyPatch):
    rate = ReadRate()
    rate.observe(1000, 1_000_000)
    rate.observe(3000, 1_000_000)
    assert rate.bytes_per_s == 2_000_000
    monkeypatch.setattr(below, "RATE_S", 0.0)
    assert rate.bytes_per_s == 0
    assert rate.last_bytes_per_s == 2_000_000
