"""A worker is killed in mid-stream, and another one goes on from what the first had put on a shared server.

``ISTHMUS_POOL_KILLS=100`` kills that often.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus import pool
from isthmus.up import with_keys
from proxy.decode_node import DecodeNode
from tests.conftest import ModelPair
from tests.cpu_decode.pool.stored_blocks import redis_server
from tests.proxy.conftest import free_port, wait_until
from tests.proxy.real_workers import MAX_TOKENS, Workers, workers_of
from transfer.config import Cluster, Decode, Pair, Prefill, Proxy
from transfer.messages import TierStatus

pytestmark = pytest.mark.engines

STORY = "Once upon a time, in a village by the sea, there lived an old fisherman who had never caught a fish. " * 12


@pytest.fixture(scope="module")
def workers(default_pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two workers on one server, and no prefill node."""
    folder = tmp_path_factory.mktemp("cluster")
    control, kv, kv_control = (free_port() for _ in range(3))
    with redis_server(folder) as server:
        cluster = Cluster(
            pair=Pair(name="pair", hf_dir=str(default_pair.hf_dir), gguf=str(default_pair.gguf)),
            prefill=Prefill(port=free_port()),
            decode=Decode(
                control_port=control,
                kv_port=kv,
                kv_control_port=kv_control,
                num_cells=2048,
                max_sequences=4,
                cell_type="bf16",
                threads=1,
                numa="off",
                # A token a piece: the moments are counted in pieces.
                speculate="off",
                pool_mib=128,
                shared_pool_url=server.url,
                disk_pool_dir=str(folder / "blocks"),
                disk_pool_mib=256,
            ),
            proxy=Proxy(port=free_port(), registry_port=free_port()),
        )
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


def test_kills_at_random_moments_neither_stop_answers_nor_spoil_blocks(workers: Workers) -> None:
    moments = random.Random(0)
    kills = int(os.environ.get("ISTHMUS_POOL_KILLS", "1"))
    nodes = workers.gateway.workers
    prompts = [f"Part {part}. {STORY}" for part in range(min(kills, 4))]
    undisturbed = ["".join(workers.stream(prompt)) for prompt in prompts]
    for number in range(kills):
        which = number % len(prompts)
        # A beginning of its own now and then, so that blocks are being written when the kill comes.
        prompt = prompts[which] if number % 2 else f"Number {number}. {STORY}"
        texts = workers.stream(prompt)
        said = [next(texts) for _ in range(moments.randrange(1, MAX_TOKENS // 2))]
        name = workers.serving_name()
        workers.processes[name].kill()
        workers.processes[name].wait(10)
        said += texts
        assert workers.entry()["status"] == "ok"
        assert "".join(said) == (undisturbed[which] if number % 2 else "".join(workers.stream(prompt)))
        workers.start(name)
        wait_until(lambda name=name: nodes.nodes[name].takes_requests)
    folder = Path(workers.gateway.cluster.decode.disk_pool_dir)
    intact, corrupt = pool.verify(folder)
    assert (intact > 0, corrupt) == (True, [])
    assert not any(tier.corrupt_blocks for node in nodes for tier in node.status.tiers)
