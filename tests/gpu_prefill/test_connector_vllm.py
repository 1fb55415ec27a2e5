"""The connector inside the real vLLM CPU engine, against Hugging Face in fp32.

vLLM in the test's own process pins its thread to one core and reloads modules, so this file gets a process to itself:
``pytest -m own_process``.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from gpu_prefill import service
from tests.conftest import ModelPair
from tests.gpu_prefill.recorder import RecordingSender, make_ticket
from transfer.config import Cluster, Link, Pair
from transfer.errors import ConfigError
from transfer.layout import interleaved_index
from transfer.messages import Landing, Ticket

pytestmark = [
    pytest.mark.engines,
    pytest.mark.own_process,
    pytest.mark.filterwarnings("ignore"),
]
pytest.importorskip("vllm")

STEP_TOKENS = 256


class Engine:
    """vLLM in this process, and the sender its worker records to."""

    def __init__(self, llm: Any, sender: RecordingSender) -> None:
        self.llm = llm
        self.sender = sender
        self.requests = 0

    @property
    def engine(self) -> Any:
        return self.llm.llm_engine

    def add(self, prompt: list[int], ticket: object, **sampling: Any) -> str:
        from vllm import SamplingParams

        self.requests += 1
        request_id = f"test-{self.requests}"
        body = msgspec.to_builtins(ticket) if isinstance(ticket, Ticket) else ticket
        extra = {"kv_transfer_params": {"isthmus": body}} if body is not None else {}
        parameters = SamplingParams(**({"max_tokens": 1, "temperature": 0} | sampling), extra_args=extra)
        self.engine.add_request(request_id, {"prompt_token_ids": prompt}, parameters)
        return request_id

    def drain(self) -> dict[str, Any]:
        """Step until idle; returns each request's final output."""
        finished = {}
        while self.engine.has_unfinished_requests():
            finished |= {output.request_id: output for output in self.engine.step() if output.finished}
        self.engine.step()
        return finished


@pytest.fixture(scope="module")
def engine(default_pair: ModelPair) -> Iterator[Engine]:
    patch = pytest.MonkeyPatch()
    pair = Pair(name="m", hf_dir=str(default_pair.hf_dir), gguf="")
    for name, value in (service.ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1"}).items():
        patch.setenv(name, value)
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    patch.setattr("gpu_prefill.connector.KVSender", RecordingSender)
    # vLLM looks into every imported module's objects and trips over llvmlite's; its own processes lack the module then.
    patch.delitem(sys.modules, "llvmlite.binding.ffi", raising=False)
    from vllm import LLM
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    llm = LLM(
        str(default_pair.hf_dir),
        max_model_len=2048,
        max_num_batched_tokens=STEP_TOKENS,
        max_num_seqs=16,
        enforce_eager=True,
        enable_prefix_caching=True,
        dtype="bfloat16",
        kv_transfer_config=msgspec.json.decode(service.kv_transfer_config(Cluster(pair=pair, link=Link(seal="none")))),
    )
    yield Engine(llm, get_kv_transfer_group()._exporter._sender)
    llm.llm_engine.engine_core.shutdown()
    patch.undo()


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(100, 40_000), k=length)


def reference(hf_dir: Path, prompt: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """K and V, fp32 ``[num_layers, tokens, heads, dim]``, as transformers computes them."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    with torch.no_grad():
        layers = model(torch.tensor([prompt]), use_cache=True).past_key_values.layers
    k, v = (torch.stack([getattr(layer, name)[0] for layer in layers]).transpose(1, 2) for name in ("keys", "values"))
    return k.numpy(), v.numpy()


def cosines(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    left, right = found.reshape(len(found), -1), wanted.reshape(len(wanted), -1)
    return (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def result_of(output: Any) -> dict[str, Any]:
    return output.kv_transfer_params["isthmus"]


def test_exports_a_chunked_prompt_then_its_prefix_hit_equal_to_hugging_face(
    engine: Engine, default_pair: ModelPair
) -> None:
    prompt = prompt_of(2 * STEP_TOKENS + 77, seed=1)
    first, again = make_ticket(1), make_ticket(2, chunk_tokens=100)
    a = engine.add(prompt, first)
    outputs = engine.drain()
    b = engine.add(prompt, again)
    outputs |= engine.drain()

    assert outputs[b].num_cached_tokens >= STEP_TOKENS
    wanted = reference(default_pair.hf_dir, prompt)
    for request_id, ticket in ((a, first), (b, again)):
        assert result_of(outputs[request_id]) == {"exported_tokens": len(prompt), "complete": True}
        assert engine.sender.tokens(ticket.ticket) == list(range(len(prompt)))
        assert engine.sender.finished[ticket.ticket] == len(prompt)
        assert all(len(elements[0]) <= ticket.chunk_tokens * 384 for _, elements in engine.sender.chunks[ticket.ticket])
        for found, want in zip(engine.sender.planes(ticket.ticket), wanted, strict=True):
            assert cosines(found, want).min() > 0.999


def test_exports_from_reused_tokens_on_in_the_order_the_landing_wants(engine: Engine) -> None:
    prompt = prompt_of(300, seed=3)
    plain = make_ticket(31)
    landed = make_ticket(32, reused_tokens=131, landing=Landing(cell_type="f16", rope_order="interleaved"))
    engine.add(prompt, plain)
    engine.drain()
    request_id = engine.add(prompt, landed)
    outputs = engine.drain()

    assert result_of(outputs[request_id]) == {"exported_tokens": 169, "complete": True}
    assert engine.sender.tokens(landed.ticket) == list(range(131, 300))
    (k, v), (k_landed, v_landed) = engine.sender.planes(plain.ticket), engine.sender.planes(landed.ticket)
    assert np.allclose(k[:, 131:][..., interleaved_index(64, 64)], k_landed, atol=0.1)
    assert np.allclose(v[:, 131:], v_landed, atol=0.1)


def test_a_batch_of_lengths_with_and_without_tickets(engine: Engine) -> None:
    lengths = [1, 5, 127, 128, 129, 300]
    tickets = {length: make_ticket(1000 + length) for length in lengths}
    ids = {length: engine.add(prompt_of(length, seed=length), tickets[length]) for length in lengths}
    silent = engine.add(prompt_of(50, seed=50), None)
    malformed = engine.add(prompt_of(50, seed=51), {"ticket": "xyz"})
    second_use = engine.add(prompt_of(50, seed=52), tickets[5])
    outputs = engine.drain()

    for length in lengths:
        assert result_of(outputs[ids[length]]) == {"exported_tokens": length, "complete": True}
        assert engine.sender.tokens(tickets[length].ticket) == list(range(length))
    assert outputs[silent].kv_transfer_params is None
    assert "not a ticket" in result_of(outputs[malformed])["error"]
    assert "used before" in result_of(outputs[second_use])["error"]
    assert len(outputs[second_use].outputs[0].token_ids) == 1


def test_an_aborted_request_aborts_its_transfer(engine: Engine) -> None:
    ticket = make_ticket(400)
    request_id = engine.add(prompt_of(3 * STEP_TOKENS, seed=4), ticket)
    engine.engine.step()
    engine.engine.abort_request([request_id])
    engine.drain()

    assert engine.sender.aborted[ticket.ticket] == "prefill was aborted"
    assert ticket.ticket not in engine.sender.finished
    assert engine.sender.tokens(ticket.ticket) == list(range(STEP_TOKENS))


def test_a_full_backlog_defers_tickets_only(engine: Engine) -> None:
    engine.sender.backlog_bytes = 1 << 40
    engine.add(prompt_of(10, seed=60), None)
    engine.drain()
    ticket = make_ticket(500)
    deferred = engine.add(prompt_of(10, seed=61), ticket)
    served = engine.add(prompt_of(10, seed=62), None)
    finished = {output.request_id for _ in range(5) for output in engine.engine.step() if output.finished}
    assert finished == {served}

    engine.sender.backlog_bytes = 0
    assert result_of(engine.drain()[deferred])["complete"]


def test_a_failed_link_fails_its_transfer_and_nothing_else(engine: Engine) -> None:
    engine.sender.refuse = True
    ticket = make_ticket(600)
    broken = engine.add(prompt_of(2 * STEP_TOKENS, seed=70), ticket)
    outputs = engine.drain()
    engine.sender.refuse = False

    assert result_of(outputs[broken])["complete"] is False
    assert result_of(outputs[broken])["error"] == "link is down"
    assert len(outputs[broken].outputs[0].token_ids) == 1
    whole = engine.add(prompt_of(20, seed=71), make_ticket(601))
    assert result_of(engine.drain()[whole])["complete"]


def test_memory_that_holds_no_step_is_refused_before_a_device_is_asked(engine: Engine) -> None:
    import torch
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    connector = get_kv_transfer_group()
    assert engine.sender is connector._exporter._sender
    assert connector._staging(torch.device("cpu")) is None
    settings = connector._settings
    connector._settings = msgspec.structs.replace(settings, sender_bytes=5 << 20)
    try:
        with pytest.raises(ConfigError, match=r"a step of 256 tokens makes 5 MiB of KV; raise .* sender_mib above 5"):
            connector._staging(torch.device("cuda"))
    finally:
        connector._settings = settings
