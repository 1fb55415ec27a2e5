"""vLLM's server on two ranks: each sends the heads and layers that it holds, a real worker joins them and goes on.

The judge is transformers in fp32 on the same weights. The last test kills a rank, and the server with it.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
import torch

from cpu_decode.geometry import read_geometry
from cpu_decode.llama import Model
from isthmus.children import Child, Children
from isthmus.up import cluster_on_free_ports
from tests.cpu_decode.serving import Running, serving
from tests.e2e.transplant import as_fp32, landed, landed_elements, prefill
from tests.families.test_families import PROMPT, Array
from tests.families.tiny_pair import TinyPair, make
from tests.proxy.conftest import wait_until
from transfer import keys
from transfer.config import Keys, Pair, Prefill
from transfer.errors import EngineError, LinkError
from transfer.geometry import KVGeometry
from transfer.layout import Elements, interleaved_index
from transfer.messages import Sampling, Ticket

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("ignore")]

NEW_TOKENS = 24
START_S = 400.0
DEADLINE_MS = 110_000
# Eight steps, so that a rank can be killed between the first and the last.
LONG_PROMPT = [1, *random.Random(6).choices(range(3, 500), k=999)]
# Where ranks wait for each other in a collective vLLM ends them after nine seconds; the worker is not to wait for that.
KILLED_DEADLINE_MS = 8_000
DIES_S = 60.0
VLLM_ARGS = ("--skip-tokenizer-init", "--dtype=bfloat16")


@dataclass(frozen=True)
class Split:
    """How many KV heads a model has, how vLLM is told to spread it, and what its ranks' logs say."""

    kv_heads: int
    vllm_args: tuple[str, ...]
    said: tuple[str, ...]


SPLITS = {
    "a head each": Split(2, ("--tensor-parallel-size=2",), ("kv_heads='range(0, 1)'", "kv_heads='range(1, 2)'")),
    "one head on both": Split(1, ("--tensor-parallel-size=2",), ("kv_heads='range(0, 1)'", "another rank exports")),
    # vLLM's CPU build starts pipeline ranks only with a warm-up, which it leaves out where it does not compile.
    "two layers each": Split(
        2,
        ("--pipeline-parallel-size=2", "--no-enforce-eager"),
        ("layers='range(0, 2)'", "layers='range(2, 4)'"),
    ),
}


class Node:
    """A pair, the worker that holds one half of it, and vLLM's address with the other; ``stack`` has its process."""

    def __init__(self, split: Split, pair: TinyPair, worker: Running, url: str, log: Path, stack: Children) -> None:
        self.split = split
        self.pair = pair
        self.worker = worker
        self.url = url
        self.log = log
        self.stack = stack


@pytest.fixture(scope="module", params=SPLITS)
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("ranks")
    split = SPLITS[request.param]
    pair = make("llama", folder, kv_heads=split.kv_heads)
    keys.make(folder / "keys")
    cluster = cluster_on_free_ports(Pair(name="tiny", hf_dir=str(pair.hf_dir), gguf=str(pair.gguf)))
    cluster = msgspec.structs.replace(
        cluster,
        keys=Keys(dir=str(folder / "keys")),
        # Two steps for the prompt.
        prefill=Prefill(
            port=cluster.prefill.port,
            max_model_len=1024,
            max_step_tokens=128,
            extra_args=(*VLLM_ARGS, *split.vllm_args),
        ),
    )
    config = folder / "isthmus.toml"
    config.write_bytes(msgspec.toml.encode(cluster))
    url = f"http://127.0.0.1:{cluster.prefill.port}"
    vllm = Child(
        name="prefill",
        command=[sys.executable, "-P", "-m", "isthmus", "prefill", "--config", str(config)],
        is_healthy=lambda: answers(url),
    )
    model = Model(pair.gguf)
    with (
        pytest.MonkeyPatch.context() as patch,
        Children([vllm], folder, start_deadline_s=START_S, grace_s=10) as children,
        serving(model, read_geometry(pair.gguf), "bf16", folder / "keys") as worker,
    ):
        # vLLM binds ranks to NUMA nodes, of which a test's host has one.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        children.start(lambda _: None)
        yield Node(split, pair, worker, url, folder / "prefill.log", children)
    model.close()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=1, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def test_both_ranks_heads_land_in_one_cache_and_decoding_goes_on(node: Node) -> None:
    client = node.worker.client
    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    ticket = client.reserve(PROMPT, sampling, "kv", deadline_ms=DEADLINE_MS)
    (first,) = prefill(node.worker, node.url, "tiny", [PROMPT], [ticket])
    elements = landed_elements(node.worker, ticket, len(PROMPT))
    for found, wanted in zip(planes(elements, node.worker.geometry), reference_kv(node), strict=True):
        cosine = (found * wanted).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(wanted, axis=-1)
        assert cosine.min() > 0.95
        assert np.median(cosine) > 0.999
    client.start(ticket, first)
    answer, _, last = client.collect(ticket)
    assert_as_the_judge_says(node, answer)
    report = last.report
    # Replicas are sent once.
    assert report.kv_raw_bytes == 2 * len(PROMPT) * node.worker.geometry.elements_per_token


def assert_as_the_judge_says(node: Node, answer: list[int]) -> None:
    """``answer`` follows ``PROMPT``, wherever the judge is sure."""
    assert len(answer) == NEW_TOKENS
    with torch.no_grad():
        logits = node.pair.reference(torch.tensor([[*PROMPT, *answer]])).logits[0, len(PROMPT) - 1 : -1]
    best = logits.log_softmax(-1).topk(2)
    sure = best.values[:, 0] - best.values[:, 1] > 0.5
    assert sure.sum() >= 5
    assert (best.indices[:, 0] == torch.tensor(answer))[sure].all()


def test_each_head_of_a_layer_has_one_sender(node: Node) -> None:
    log = node.log.read_text()
    assert [log.count(each) for each in node.split.said] == [1, 1]


def planes(elements: Elements, geometry: KVGeometry) -> tuple[Array, Array]:
    """K and V in cells, fp32 ``[num_layers, tokens, heads, dim]``."""
    values = as_fp32(elements, "bf16").reshape(geometry.num_layers, 2, len(PROMPT), geometry.num_kv_heads, -1)
    return values[:, 0], values[:, 1]


def reference_kv(node: Node) -> tuple[Array, Array]:
    """The judge's, keys in the order of the cells."""
    from transformers import DynamicCache

    with torch.no_grad():
        cache = node.pair.reference(torch.tensor([PROMPT]), past_key_values=DynamicCache()).past_key_values
    k, v = (
        torch.stack([getattr(layer, kind)[0] for layer in cache.layers]).transpose(1, 2).numpy()
        for kind in ("keys", "values")
    )
    geometry = node.worker.geometry
    return k[..., interleaved_index(geometry.head_dim_k, geometry.rope_dims)], v


def test_a_rank_killed_in_mid_prefill_fails_its_request_and_leaves_nothing(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last: it takes the prefill node with it."""
    client, worker = node.worker.client, node.worker.worker
    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    # A rank that has its link already sends its first chunk while it computes the second.
    with landed(node.worker, node.url, "tiny", PROMPT):
        pass
    # On a busy machine the prefill may be over all the same: some KV must stay out.
    monkeypatch.setattr(worker._receiver, "grant", lambda *_: None)
    ticket = client.reserve(LONG_PROMPT, sampling, "kv", deadline_ms=KILLED_DEADLINE_MS)
    sequences = worker.engine.batching._sequences
    wait_until(lambda: ticket.request_id in sequences)
    sequence = sequences[ticket.request_id]
    rank = dict(re.findall(r"\(Worker_[TP]P(\d) pid=(\d+)\)", node.log.read_text()))["1"]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask_vllm, node, ticket)
        slow_until(int(rank), lambda: sequence.num_cached > 0)
        os.kill(int(rank), signal.SIGKILL)
        # As if vLLM had answered: now nothing but the missing KV keeps the worker from decoding.
        client.start(ticket, first_token=7)
        # The rank that is left says that it ends, or waits in a collective until time runs out at one end.
        with pytest.raises(LinkError, match=r"aborted the transfer|expired waiting for its KV"):
            client.next_tokens(ticket)
        assert sequence.num_cached < len(LONG_PROMPT)
        wait_until(lambda: not worker._promised)
        # The thread that answers is the one that gives everything back.
        status = client.status()
        assert status.used_cells == status.landing_bytes == 0
        assert worker._receiver.open_tickets == worker._promised.pool.in_use == 0
        assert node.worker.empty
        answer.exception(DIES_S)
    # Whoever started it hears of it, and may start it again.
    with pytest.raises(EngineError, match="prefill died with"):
        for _ in range(int(DIES_S)):
            node.stack.require_alive()
            time.sleep(1)
    local = client.reserve(PROMPT, sampling, "local")
    client.start(local)
    assert_as_the_judge_says(node, client.collect(local)[0])


def slow_until(pid: int, condition: Callable[[], bool]) -> None:
    """Let a rank run a millisecond at a time: the others wait for it, and what a step made lands before the next."""

    def holds_later() -> bool:
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.001)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.01)
        return condition()

    wait_until(holds_later)


def ask_vllm(node: Node, ticket: Ticket) -> None:
    """Prefill ``LONG_PROMPT`` for ``ticket``, whatever comes of it."""
    body = {
        "model": "tiny",
        "prompt": LONG_PROMPT,
        "max_tokens": 1,
        "kv_transfer_params": {"isthmus": msgspec.to_builtins(ticket)},
    }
    httpx.post(f"{node.url}/v1/completions", json=body, timeout=DIES_S, trust_env=False)
