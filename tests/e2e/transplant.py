"""A prompt's KV from the real vLLM server into a worker's cells, and out again for a test to look at."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import msgspec
import numpy as np

from tests.cpu_decode.native_kv import elements_of
from tests.cpu_decode.serving import Running as Serving
from transfer.layout import Elements
from transfer.messages import Sampling, Ticket

GREEDY = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)


def prefill(
    serving: Serving, prefill_url: str, model: str, prompts: list[list[int]], tickets: list[Ticket]
) -> list[int]:
    """Run the prompts through vLLM, all at once; returns each one's first token, greedily sampled.

    The worker hears from its client meanwhile: it would give up on one that is silent, and vLLM may take its time.
    """
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [pool.submit(_prefill_one, prefill_url, model, *each) for each in zip(prompts, tickets, strict=True)]
        while not all(answer.done() for answer in answers):
            serving.client.status()
            time.sleep(0.1)
    return [answer.result() for answer in answers]


def _prefill_one(prefill_url: str, model: str, prompt: list[int], ticket: Ticket) -> int:
    """Run ``prompt`` through vLLM with ``ticket``; returns the first token, greedily sampled."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 0,
        "return_token_ids": True,
        "kv_transfer_params": {"isthmus": msgspec.to_builtins(ticket)},
    }
    response = httpx.post(f"{prefill_url}/v1/completions", json=body, timeout=120, trust_env=False)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["kv_transfer_params"]["isthmus"] == {"exported_tokens": len(prompt), "complete": True}
    return int(answer["choices"][0]["token_ids"][0])


def landed_elements(serving: Serving, ticket: Ticket, num_tokens: int) -> Elements:
    """Wait until the ticket's KV is in the cells, and return its rows. Nothing else may be decoding."""
    sequence = serving.worker.engine.batching._sequences[ticket.request_id]
    deadline = time.monotonic() + 20
    while sequence.landing is None:
        assert time.monotonic() < deadline, "the KV never came"
        time.sleep(0.01)
    return elements_of(serving.context.state(sequence.seq_id), serving.geometry, num_tokens)


@contextmanager
def landed(serving: Serving, prefill_url: str, model: str, prompt: list[int]) -> Iterator[tuple[Elements, Ticket, int]]:
    """The prompt's rows as they lie in the worker's cells, its ticket, and the token vLLM sampled after it."""
    ticket = serving.client.reserve(prompt, GREEDY, "kv")
    try:
        (first,) = prefill(serving, prefill_url, model, [prompt], [ticket])
        yield landed_elements(serving, ticket, len(prompt)), ticket, first
    finally:
        serving.client.abort(ticket)


def as_fp32(elements: Elements, cell_type: str) -> np.ndarray:
    """Elements as numbers."""
    if cell_type == "f16":
        return elements.view(np.float16).astype(np.float32)
    return (elements.astype(np.uint32) << 16).view(np.float32)
