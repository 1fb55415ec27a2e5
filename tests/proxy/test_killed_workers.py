"""Real decode workers that are killed, or asked to end, in the middle of an answer.

What the first had put on a shared server, the other one goes on from. Many kills: ``isthmus measure pool --kills``.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from isthmus import pool
from isthmus.up import cluster_on_free_ports, with_keys
from proxy.decode_node import DecodeNode
from tests.conftest import ModelPair
from tests.cpu_decode.pool.stored_blocks import redis_server
from tests.proxy.conftest import wait_until
from tests.proxy.real_workers import MAX_TOKENS, Workers, workers_of
from transfer.config import Pair
from transfer.messages import TierStatus

pytestmark = pytest.mark.engines

PROMPT = "Once upon a time, in a village by the sea, there lived an old fisherman who"
STORY = f"{PROMPT} had never caught a fish. " * 12


@pytest.fixture(scope="module")
def workers(default_pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two workers on one server and one folder of blocks, and no prefill node."""
    folder = tmp_path_factory.mktemp("cluster")
    pair = Pair(name="pair", hf_dir=str(default_pair.hf_dir), gguf=str(default_pair.gguf))
    cluster = cluster_on_free_ports(pair)
    with redis_server(folder) as server:
        decode = msgspec.structs.replace(
            cluster.decode,
            num_cells=2048,
            max_sequences=4,
            cell_type="bf16",
            threads=1,
            numa="off",
            drain_s=60.0,
            # A token a piece: the moments are counted in pieces.
            speculate="off",
            pool_mib=128,
            shared_pool_url=server.url,
            disk_pool_dir=str(folder / "blocks"),
            disk_pool_mib=256,
        )
        cluster = msgspec.structs.replace(cluster, decode=decode)
        with workers_of(with_keys(cluster, folder / "keys"), folder) as running:
            yield running


def shared(node: DecodeNode) -> TierStatus:
    """What the worker last said of the shared tier."""
    assert node.status is not None
    return next(tier for tier in node.status.tiers if tier.name == "shared")


def test_only_what_no_tier_has_is_computed_again(workers: Workers) -> None:
    texts = workers.stream(STORY)
    said = [next(texts) for _ in range(20)]
    name = workers.serving_name()
    (other,) = (node for node in workers.gateway.workers if node.name != name)
    killed = workers.gateway.workers.nodes[name]
    # The prompt is there before its answer has ended.
    wait_until(lambda: shared(killed).blocks >= 3)
    workers.processes[name].kill()
    assert workers.processes[name].wait(10) == -signal.SIGKILL
    said += texts
    entry = workers.entry()
    assert (entry["status"], entry["failed_over"], entry["worker"]) == ("ok", "link_error", other.name)
    first, second = entry["attempts"]
    assert first["completion_tokens"] + second["completion_tokens"] == MAX_TOKENS
    prompt_tokens = entry["prompt_tokens"]
    assert prompt_tokens > 200
    # All full blocks of the prompt came back; the tokens of the answer were known, and computed.
    assert entry["kv_reused_tokens"] >= prompt_tokens // 64 * 64
    wait_until(lambda: shared(other).hit_tokens >= entry["kv_reused_tokens"] // 64 * 64 > 0)
    assert "".join(workers.stream(STORY)) == "".join(said)
    workers.start(name)


def test_a_worker_is_killed_in_mid_stream(workers: Workers) -> None:
    undisturbed = "".join(workers.stream(PROMPT))
    assert workers.entry()["attempts"][0]["error"] is None
    texts = workers.stream(PROMPT)
    said = [next(texts) for _ in range(20)]
    name = workers.serving_name()
    workers.processes[name].kill()
    assert workers.processes[name].wait(10) == -signal.SIGKILL
    said += texts
    assert "".join(said) == undisturbed
    entry = workers.entry()
    assert (entry["status"], entry["reason"], entry["failed_over"]) == ("ok", "failed_over", "link_error")
    first, second = entry["attempts"]
    assert first["worker"] == name != second["worker"] == entry["worker"]
    assert entry["completion_tokens"] == first["completion_tokens"] + second["completion_tokens"] == MAX_TOKENS
    assert first["completion_tokens"] >= 20
    # It comes back without a restart of the proxy.
    workers.start(name)


def test_a_kill_at_a_random_moment_neither_stops_an_answer_nor_spoils_blocks(workers: Workers) -> None:
    # A beginning of its own, so that blocks are being written when the kill comes.
    prompt = f"Number 1. {STORY}"
    texts = workers.stream(prompt)
    said = [next(texts) for _ in range(random.Random(0).randrange(1, MAX_TOKENS // 2))]
    name = workers.serving_name()
    workers.processes[name].kill()
    workers.processes[name].wait(10)
    said += texts
    assert workers.entry()["status"] == "ok"
    assert "".join(said) == "".join(workers.stream(prompt))
    workers.start(name)
    intact, corrupt = pool.verify(Path(workers.gateway.cluster.decode.disk_pool_dir))
    assert (intact > 0, corrupt) == (True, [])
    nodes = workers.gateway.workers
    assert not any(tier.corrupt_blocks for node in nodes for tier in node.status.tiers)


def test_a_worker_that_is_asked_to_end_finishes_its_answers_first(workers: Workers) -> None:
    texts = workers.stream(PROMPT)
    said = [next(texts) for _ in range(5)]
    name = workers.serving_name()
    workers.processes[name].terminate()
    wait_until(lambda: workers.gateway.workers.nodes[name].draining)
    # New requests go to the other one, and this one is still being served.
    other = "".join(workers.stream(PROMPT, max_tokens=2))
    assert workers.entry()["worker"] != name
    said += texts
    assert "".join(said).startswith(other)
    entry = workers.entry()
    assert [attempt["worker"] for attempt in entry["attempts"]] == [name]
    assert entry["completion_tokens"] == MAX_TOKENS
    assert workers.processes[name].wait(30) == 0
