"""Is it the same KV, in the right order, and does decoding continue as well as the model itself would?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpu_decode.geometry import read_geometry
from cpu_decode.llama import Batch, Context, Model
from cpu_decode.state import ChunkState
from tests.conftest import ModelPair
from tests.cpu_decode.native_kv import chunk_of, elements_of
from tests.cpu_decode.native_kv import prefill as prefill_natively
from tests.cpu_decode.serving import Running as Serving
from tests.cpu_decode.serving import serving
from tests.e2e.conftest import Running
from tests.e2e.transplant import GREEDY, as_fp32, landed, landed_elements, prefill

pytestmark = pytest.mark.engines

CONTINUATION_TOKENS = 6


@pytest.fixture(scope="module")
def model(default_pair: ModelPair) -> Iterator[Model]:
    model = Model(default_pair.gguf)
    yield model
    model.close()


@pytest.fixture(scope="module")
def f16(model: Model, default_pair: ModelPair, stack: Running) -> Iterator[Serving]:
    with serving(model, read_geometry(default_pair.gguf), "f16", Path(stack.cluster.keys.dir)) as running:
        yield running


@pytest.fixture(scope="module")
def bf16(model: Model, default_pair: ModelPair, stack: Running) -> Iterator[Serving]:
    with serving(model, read_geometry(default_pair.gguf), "bf16", Path(stack.cluster.keys.dir)) as running:
        yield running


@pytest.fixture
def f16_context(model: Model) -> Iterator[Context]:
    context = Context(model, num_cells=2048, max_sequences=2, batch_tokens=2048, threads=1, cell_type="f16")
    yield context
    context.close()


@pytest.fixture(scope="module")
def tokenizer(default_pair: ModelPair) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(default_pair.hf_dir)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, shipped_text: str) -> dict[str, list[int]]:
    story = tokenizer(shipped_text)["input_ids"]
    licence = tokenizer((Path(__file__).parents[2] / "LICENSE").read_text())["input_ids"]
    code = tokenizer(Path(__file__).read_text())["input_ids"]
    return {
        "a sentence": tokenizer("The capital of France is")["input_ids"],
        "a paragraph": story[:150],
        "exactly one block": story[:128],
        "legal": licence[:400],
        "more legal, its prefix cached by the last": licence[:700],
        "code": code[:333],
        "a page, in several steps": story[:900],
        "a long page, in several steps": licence[:1200],
        "a question": tokenizer("Q: What is a lighthouse for?\nA:")["input_ids"],
    }


@pytest.fixture(scope="module")
def reference(default_pair: ModelPair) -> Any:
    """The fp32 model."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(default_pair.hf_dir, dtype=torch.float32).eval()


def test_rounding_to_fp16_is_all_that_happens_to_the_kv(stack: Running, f16: Serving, bf16: Serving, prompts: Any):
    # Whole blocks of 128 come from vLLM's prefix cache the second time: the very same bytes.
    prompt = prompts["a page, in several steps"]
    whole = len(prompt) // 128 * 128
    with landed(bf16, stack.prefill_url, stack.cluster.pair.name, prompt) as (exact, _, _):
        pass
    with landed(f16, stack.prefill_url, stack.cluster.pair.name, prompt) as (rounded, _, _):
        pass
    row = bf16.geometry.num_kv_heads * bf16.geometry.head_dim_k
    for plane in (slice(0, whole * row), slice(len(prompt) * row, (len(prompt) + whole) * row)):
        source = as_fp32(exact[:, plane], "bf16")
        assert np.array_equal(source.astype(np.float16), rounded[:, plane].view(np.float16))
        # bf16 has fewer mantissa bits, so only values in fp16's subnormal range can move at all.
        assert np.abs(source - as_fp32(rounded[:, plane], "f16")).max() <= 2**-25


def test_keys_and_values_are_in_llama_cpps_order(stack: Running, f16: Serving, f16_context: Context, prompts: Any):
    prompt = prompts["legal"]
    with landed(f16, stack.prefill_url, stack.cluster.pair.name, prompt) as (elements, _, _):
        ours = as_fp32(elements, "f16")
    prefill_natively(f16_context, 0, prompt)
    theirs = as_fp32(elements_of(f16_context.state(0), f16.geometry, len(prompt)), "f16")
    split = len(prompt) * f16.geometry.num_kv_heads * f16.geometry.head_dim_k
    for layer in range(f16.geometry.num_layers):
        assert cosine(ours[layer, :split], theirs[layer, :split]) > 0.999
        assert cosine(ours[layer, split:], theirs[layer, split:]) > 0.99


def test_split_decoding_is_decoding_from_the_transplanted_kv(stack: Running, bf16: Serving, model: Model, prompts: Any):
    """The worker, with chunks, credits and batches, against one whole injection and a plain greedy loop."""
    context = Context(model, num_cells=2048, max_sequences=1, batch_tokens=64, threads=1, cell_type="bf16")
    for prompt in (prompts["a sentence"], prompts["a page, in several steps"]):
        with landed(bf16, stack.prefill_url, stack.cluster.pair.name, prompt) as (elements, ticket, first):
            bf16.client.start(ticket, first)
            ids, _, _ = bf16.client.collect(ticket)
        assert ids == decode_alone(context, chunk_of(bf16.geometry, elements, 0, len(prompt)), first)
    context.close()


def test_ten_at_once_decode_as_one_by_one(stack: Running, bf16: Serving, model: Model, prompts: Any):
    """Ten prompts prefill in vLLM's batches and decode in one; each gets what its own KV gives it alone.

    The KV itself is taken as it came: vLLM's bf16 kernels round differently in batches of other sizes.
    """
    story = prompts["a long page, in several steps"]
    ten = [story[31 * n : 31 * n + 20 + 37 * n] for n in range(10)]
    with ExitStack() as held:
        tickets = [bf16.client.reserve(prompt, GREEDY, "kv") for prompt in ten]
        for ticket in tickets:
            held.callback(bf16.client.abort, ticket)
        url, name = stack.prefill_url, stack.cluster.pair.name
        firsts = prefill(bf16, url, name, ten, tickets)
        kv = [landed_elements(bf16, ticket, len(prompt)) for prompt, ticket in zip(ten, tickets, strict=True)]
        for ticket, first in zip(tickets, firsts, strict=True):
            bf16.client.start(ticket, first)
        together = [bf16.client.collect(ticket)[0] for ticket in tickets]
    context = Context(model, num_cells=1024, max_sequences=1, batch_tokens=64, threads=1, cell_type="bf16")
    alone = [
        decode_alone(context, chunk_of(bf16.geometry, elements, 0, len(prompt)), first)
        for prompt, elements, first in zip(ten, kv, firsts, strict=True)
    ]
    context.close()
    assert together == alone
    assert len({tuple(ids) for ids in together}) == 10


def test_transplanted_kv_is_no_worse_than_llama_cpps_own(
    stack: Running, f16: Serving, f16_context: Context, prompts: Any, reference: Any
):
    """Mean KL to the fp32 model, over the prompt's last position and a teacher-forced continuation."""
    split, native = {}, {}
    for name, prompt in prompts.items():
        continuation, expected = continue_greedily(reference, prompt)
        with landed(f16, stack.prefill_url, stack.cluster.pair.name, prompt) as (elements, _, _):
            pass
        f16_context.inject(chunk_of(f16.geometry, elements, 0, len(prompt), "f16"), 0)
        split[name] = mean_kl(expected, logits_after(f16_context, prompt, continuation))
        prefill_natively(f16_context, 0, prompt)
        native[name] = mean_kl(expected, logits_after(f16_context, prompt, continuation))
    assert np.mean(list(split.values())) <= np.mean(list(native.values()))
    assert max(split.values()) < 0.2


def decode_alone(context: Context, prompt: ChunkState, first: int) -> list[int]:
    """Greedy tokens after ``first``, by one whole injection and a plain loop; the cells are freed."""
    context.inject(prompt, 0)
    ids = [first]
    while len(ids) < GREEDY.max_tokens:
        ids.append(int(step(context, prompt.num_tokens + len(ids) - 1, ids[-1]).argmax()))
    context.trim(0, 0)
    return ids


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def step(context: Context, position: int, token: int) -> np.ndarray:
    batch = Batch(1)
    row = batch.add(0, position, [token], want_logits=True)
    context.decode(batch)
    return context.logits(row)


def logits_after(context: Context, prompt: list[int], continuation: list[int]) -> list[np.ndarray]:
    """Logits at the prompt's last position and after each token of the continuation; the cells are freed."""
    context.trim(0, len(prompt) - 1)
    tokens = [prompt[-1], *continuation]
    logits = [step(context, len(prompt) - 1 + n, token) for n, token in enumerate(tokens)]
    context.trim(0, 0)
    return logits


def continue_greedily(reference: Any, prompt: list[int]) -> tuple[list[int], list[np.ndarray]]:
    import torch

    with torch.no_grad():
        out = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=CONTINUATION_TOKENS + 1,
            min_new_tokens=CONTINUATION_TOKENS + 1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            pad_token_id=0,
        )
    continuation = out.sequences[0, len(prompt) : len(prompt) + CONTINUATION_TOKENS].tolist()
    return continuation, [logits[0].numpy() for logits in out.logits]


def mean_kl(expected: list[np.ndarray], got: list[np.ndarray]) -> float:
    return float(np.mean([kl(p, q) for p, q in zip(expected, got, strict=True)]))


def kl(p_logits: np.ndarray, q_logits: np.ndarray) -> float:
    """KL(p || q) in nats of two rows of logits."""
    p, q = log_softmax(p_logits.astype(np.float64)), log_softmax(q_logits.astype(np.float64))
    return float((np.exp(p) * (p - q)).sum())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
