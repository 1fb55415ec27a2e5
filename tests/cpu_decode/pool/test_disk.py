"""Blocks on a disk: there again after a restart, never wrong, never more bytes than allowed, whatever the disk does."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_decode.pool import block_files
from cpu_decode.pool.block_log import BlockLog
from cpu_decode.pool.disk import DiskTier
from cpu_decode.pool.stored import HEADER_BYTES, StoredBlock
from tests.cpu_decode.pool.stored_blocks import OTHER_SEED, SEED, block

# What a block of 1000 bytes takes.
SIZE = 1000 + HEADER_BYTES


@contextmanager
def disk(folder: Path, max_bytes: int = 100 * SIZE, seed: bytes = SEED) -> Iterator[DiskTier]:
    tier = DiskTier(folder, max_bytes, seed, BlockLog())
    tier.load()
    try:
        yield tier
    finally:
        tier.close()


def has(tier: DiskTier, *numbers: int) -> list[bool]:
    return [tier.holds(block(number).name) for number in numbers]


def files(folder: Path) -> list[Path]:
    return [path for part in block_files.parts(folder) for path in block_files.walk(part)]


def known(tier: DiskTier) -> int:
    return len(tier._known.since(0).added.get("disk", ()))


def test_what_was_put_there_is_there_after_a_restart(tmp_path):
    with disk(tmp_path) as tier:
        for number in range(5):
            tier.put(block(number))
        tier.put(block(2))
        assert (len(tier), tier.used_bytes, known(tier)) == (5, 5 * SIZE, 5)
    with disk(tmp_path) as tier:
        assert (len(tier), tier.used_bytes, known(tier)) == (5, 5 * SIZE, 5)
        got = tier.get([block(number).name for number in (3, 1, 9, 2)])
        assert [np.array_equal(a, block(n).payload) for a, n in zip(got, (3, 1), strict=True)] == [True, True]
        assert tier.get([block(9).name]) == []


def test_a_restart_reads_headers_only(tmp_path, monkeypatch):
    with disk(tmp_path, 1 << 21) as tier:
        tier.put(block(1, 1 << 20))
    read_bytes = 0
    whole = os.fstat

    def count(descriptor):
        nonlocal read_bytes
        read_bytes += os.lseek(descriptor, 0, os.SEEK_CUR)
        return whole(descriptor)

    monkeypatch.setattr(os, "fstat", count)
    with disk(tmp_path, 1 << 21) as tier:
        assert len(tier) == 1
    assert read_bytes == HEADER_BYTES


def test_it_stays_within_its_bytes_and_a_scan_does_not_empty_it(tmp_path):
    with disk(tmp_path, 10 * SIZE) as tier:
        for number in range(8):
            tier.put(block(number))
        assert len(tier.get([block(n).name for n in range(8)])) == 8
        for number in range(100, 150):
            tier.put(block(number))
            assert tier.used_bytes <= 10 * SIZE
        assert all(has(tier, *range(8)))
        assert (tier.losses.evictions, tier.losses.evicted) == (48, {"probation": 48})
        assert len(files(tmp_path)) == known(tier) == 10
        tier.put(block(200, 20 * SIZE))
        assert not any(has(tier, 200))
        assert tier.losses.refused == {"too_large": 1}
        # Two scans of used blocks: the first ones fall back on probation, and go.
        for number in range(300, 320):
            tier.put(block(number))
            tier.get([block(number).name])
        block_files.path_of(tmp_path / "0", block(319).name).unlink()
        assert tier.get([block(319).name]) == []
        assert tier.losses.evicted["gone"] == 1
    with disk(tmp_path, 10 * SIZE, OTHER_SEED) as tier:
        for number in range(400, 404):
            tier.put(block(number, seed=OTHER_SEED))
        assert tier.losses.evicted == {"foreign": 3}


def test_a_smaller_limit_after_a_restart_lets_the_least_recently_used_go(tmp_path):
    with disk(tmp_path) as tier:
        for number in range(6):
            tier.put(block(number))
            os.utime(block_files.path_of(tmp_path / "0", block(number).name), (number, number))
        tier.get([block(0).name])
    with disk(tmp_path, 3 * SIZE) as tier:
        assert has(tier, *range(6)) == [True, False, False, False, True, True]
        assert len(files(tmp_path)) == 3


@given(at=st.integers(0, SIZE - 1), flip=st.integers(1, 255), restart=st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_damaged_block_is_dropped_and_counted_and_never_served(tmp_path_factory, at, flip, restart):
    folder = tmp_path_factory.mktemp("pool")
    with disk(folder) as tier:
        for number in range(3):
            tier.put(block(number))
        path = block_files.path_of(folder / "0", block(1).name)
        data = bytearray(path.read_bytes())
        data[at] ^= flip
        path.write_bytes(data)
        if not restart:
            assert len(tier.get([block(n).name for n in range(3)])) == 1
            assert (tier.corrupt_blocks, path.exists(), has(tier, 0, 1, 2)) == (1, False, [True, False, True])
    with disk(folder) as tier:
        tier.get([block(1).name])
        assert not any(has(tier, 1))
        assert tier.corrupt_blocks == restart
        tier.put(block(1))
        assert len(tier.get([block(n).name for n in range(3)])) == 3


@pytest.mark.parametrize("length", [0, 10, HEADER_BYTES, HEADER_BYTES + 500, SIZE - 1, SIZE + 1])
def test_a_torn_file_is_dropped_when_it_is_found(tmp_path, length):
    with disk(tmp_path) as tier:
        tier.put(block(1))
    os.truncate(block_files.path_of(tmp_path / "0", block(1).name), length)
    with disk(tmp_path) as tier:
        assert (len(tier), tier.corrupt_blocks, files(tmp_path)) == (0, 1, [])


def test_another_models_blocks_match_nothing_and_go_when_room_is_needed(tmp_path):
    with disk(tmp_path, 4 * SIZE, OTHER_SEED) as tier:
        for number in range(4):
            tier.put(block(number, seed=OTHER_SEED))
    with disk(tmp_path, 4 * SIZE) as tier:
        assert (tier.used_bytes, known(tier), any(has(tier, *range(4)))) == (4 * SIZE, 0, False)
        assert not tier.holds(block(0, seed=OTHER_SEED).name)
        tier.put(block(1))
        assert (tier.used_bytes, has(tier, 1)) == (4 * SIZE, [True])


def test_two_names_with_one_key_are_told_apart(tmp_path):
    mine = block(1)
    theirs = StoredBlock(mine.name[:16] + bytes(16), SEED, 0, 64, block(2).payload)
    with disk(tmp_path) as tier:
        tier.put(theirs)
        assert not tier.holds(mine.name)
        assert tier.get([mine.name]) == []
        tier.put(mine)
        assert (tier.holds(mine.name), tier.holds(theirs.name), len(files(tmp_path))) == (True, False, 1)
        # Not even a file that was exchanged behind its back.
        block_files.write(tmp_path / "0", theirs)
        assert tier.get([mine.name]) == []
        assert tier.corrupt_blocks == 1


def test_workers_on_one_folder_keep_out_of_each_others_way(tmp_path):
    with disk(tmp_path) as first, disk(tmp_path) as second:
        first.put(block(1))
        second.put(block(2))
        assert (has(first, 1, 2), has(second, 1, 2)) == ([True, False], [False, True])
        assert [block_files.in_use(part) for part in block_files.parts(tmp_path)] == [True, True]
    assert [block_files.in_use(part) for part in block_files.parts(tmp_path)] == [False, False]
    with disk(tmp_path) as again:
        assert has(again, 1) == [True]


def test_a_full_disk_switches_writing_off_for_a_while(tmp_path):
    with disk(tmp_path) as tier:
        tier.put(block(1))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, before[1]))
        try:
            tier.put(block(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert tier.capacity_bytes == 0
        assert has(tier, 1, 2) == [True, False]
        assert list((tmp_path / "0" / "tmp").iterdir()) == []
        # Not before its time; what is there is still read.
        tier.put(block(2))
        assert (has(tier, 2), len(tier.get([block(1).name]))) == ([False], 1)
        tier._pause._until_ns = 0
        tier.put(block(2))
        assert (has(tier, 2), tier.capacity_bytes) == ([True], 100 * SIZE)


def test_a_folder_that_is_none_leaves_the_worker_without_a_disk_tier(tmp_path):
    (tmp_path / "file").touch()
    with disk(tmp_path / "file") as tier:
        tier.put(block(1))
        assert (tier.get([block(1).name]), tier.capacity_bytes, len(tier)) == ([], 0, 0)


def test_files_that_vanish_are_forgotten(tmp_path):
    with disk(tmp_path) as tier:
        tier.put(block(1))
        files(tmp_path)[0].unlink()
        assert tier.get([block(1).name]) == []
        assert (len(tier), tier.corrupt_blocks, known(tier)) == (0, 0, 0)


def test_whoever_is_killed_while_writing_leaves_whole_blocks_only(tmp_path):
    program = """
        import sys
        from pathlib import Path
        from cpu_decode.pool.block_log import BlockLog
        from cpu_decode.pool.disk import DiskTier
        from tests.cpu_decode.pool.stored_blocks import SEED, block
        tier = DiskTier(Path(sys.argv[1]), 1 << 30, SEED, BlockLog())
        tier.load()
        number = int(sys.argv[2])
        print("ready", flush=True)
        while True:
            tier.put(block(number, 300_000))
            number += 1
    """
    for round_number in range(3):
        command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), str(1000 * round_number)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        while len(files(tmp_path)) < 5 * (round_number + 1):
            assert process.poll() is None
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    with disk(tmp_path, 1 << 30) as tier:
        assert tier.corrupt_blocks == 0
        numbers = [n for start in (0, 1000, 2000) for n in range(start, start + 500) if tier.holds(block(n, 1).name)]
        assert len(numbers) == len(tier) >= 15
        got = tier.get([block(n, 1).name for n in numbers])
        assert all(np.array_equal(a, block(n, 300_000).payload) for a, n in zip(got, numbers, strict=True))
        assert list((tmp_path / "0" / "tmp").iterdir()) == []


def test_a_write_that_a_kill_has_torn_is_dropped_and_counted(tmp_path):
    with disk(tmp_path) as tier:
        tier.put(block(1))
        assert tier.losses.refused == {}
    torn = tmp_path / "0" / "tmp" / block_files.path_of(tmp_path / "0", block(2).name).name
    torn.write_bytes(block(2).header())
    with disk(tmp_path) as tier:
        assert (tier.losses.refused, tier.corrupt_blocks, has(tier, 1, 2)) == ({"torn": 1}, 0, [True, False])
        assert not torn.exists()
