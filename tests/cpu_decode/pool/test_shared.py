"""A real server of Redis's protocol that is shared, damaged, filled and taken away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cpu_decode.pool.block_log import BlockLog
from cpu_decode.pool.shared import PREFIX, SharedTier
from tests.cpu_decode.pool.stored_blocks import OTHER_SEED, SEED, RedisServer, block, redis_server
from transfer.errors import ConfigError


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path, "--maxmemory", "8mb") as server:
        yield server


def tier_at(server: RedisServer, seed: bytes = SEED) -> SharedTier:
    return SharedTier(server.url, seed, BlockLog())


def known(tier: SharedTier) -> int:
    return len(tier._known.since(0).added.get("shared", ()))


def test_one_worker_reads_what_another_has_written(server):
    writer, reader = tier_at(server), tier_at(server)
    for number in range(20):
        writer.put(block(number))
    wanted = [block(number).name for number in range(21)]
    got = reader.get(wanted)
    assert len(got) == len(reader) == known(reader) == known(writer) == 20
    assert all(np.array_equal(payload, block(n).payload) for n, payload in enumerate(got))
    assert reader.used_bytes == writer.used_bytes == 20 * block(0).num_bytes
    assert reader.get([block(30).name]) == []
    assert [reader.holds(name) for name in wanted[19:]] == [True, False]
    # Another model's worker sees none of it.
    assert tier_at(server, OTHER_SEED).get([block(0, seed=OTHER_SEED).name]) == []


def test_what_is_there_is_not_sent_again(server):
    first, second = tier_at(server), tier_at(server)
    first.put(block(1))
    received = first._client.info("stats")["total_net_input_bytes"]
    second.put(block(1, 1000))
    first.put(block(1))
    assert second._client.info("stats")["total_net_input_bytes"] - received < 800
    assert second.holds(block(1).name)


@pytest.mark.parametrize("damage", ["payload", "header", "short", "foreign", "empty"])
def test_what_is_damaged_there_is_dropped_and_counted(server, damage):
    tier = tier_at(server)
    for number in range(3):
        tier.put(block(number))
    key = PREFIX + block(1).name.hex()[:32].encode()
    data = bytearray(tier._client.get(key))
    match damage:
        case "payload":
            data[-1] ^= 1
        case "header":
            data[20] ^= 1
        case "short":
            del data[-1:]
        case "foreign":
            other = block(2)
            data = bytearray(other.header() + other.payload.tobytes())
        case "empty":
            data.clear()
    tier._client.set(key, bytes(data))
    assert len(tier.get([block(number).name for number in range(3)])) == 1
    assert (tier.corrupt_blocks, tier._client.exists(key), tier.holds(block(1).name)) == (1, 0, False)
    assert tier.losses.evicted == {"corrupt": 1}
    tier.put(block(1))
    assert len(tier.get([block(number).name for number in range(3)])) == 3


def test_a_server_that_goes_away_is_left_alone_for_a_while_and_found_again(server):
    tier = tier_at(server)
    tier.put(block(1))
    server.kill()
    assert tier.get([block(1).name]) == []
    assert not tier.may_hold(block(1).name)
    began = time.monotonic()
    for _ in range(100):
        tier.put(block(2))
        assert tier.get([block(1).name]) == []
    assert time.monotonic() - began < 0.5
    Path(server.url.removeprefix("unix://")).unlink(missing_ok=True)
    server.start()
    tier._pause._until_ns = 0
    tier.put(block(3))
    assert len(tier.get([block(3).name])) == 1
    # The new one never had it: it may be put there again.
    assert tier.get([block(1).name]) == []
    assert not tier.holds(block(1).name)
    assert tier.losses.evicted == {"gone": 1}
    assert tier.losses.refused == {"paused": 100}


def test_a_server_that_stalls_costs_a_second(server, monkeypatch):
    monkeypatch.setattr("cpu_decode.pool.shared.ANSWER_S", 0.2)
    tier = tier_at(server)
    tier.put(block(1))
    tier._client.execute_command("CLIENT", "PAUSE", "2000", "ALL")
    began = time.monotonic()
    assert tier.get([block(1).name]) == []
    assert time.monotonic() - began < 1.5
    assert not tier.may_hold(block(1).name)


def test_a_full_server_takes_no_more_and_gives_what_it_has(server):
    tier = tier_at(server)
    for number in range(12):
        tier._pause._until_ns = 0
        tier.put(block(number, 1 << 20))
    there = [tier.holds(block(number, 1 << 20).name) for number in range(12)]
    assert 1 <= sum(there) < 12
    tier._pause._until_ns = 0
    assert len(tier.get([block(0, 1 << 20).name])) == 1


def test_a_name_that_is_no_url_is_refused_with_the_key():
    pytest.importorskip("redis")
    with pytest.raises(ConfigError, match=r"at \[decode\] shared_pool_url"):
        SharedTier("10.0.0.5:6379", SEED, BlockLog())


def test_nobody_at_the_url_is_no_reason_not_to_start():
    pytest.importorskip("redis")
    tier = SharedTier("unix:///nowhere/redis.sock", SEED, BlockLog())
    assert tier.get([block(1).name]) == []
    tier.put(block(1))
    assert len(tier) == 0
