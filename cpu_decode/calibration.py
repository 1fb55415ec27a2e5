"""How fast this host computes a prompt and copies KV into cells, timed once before a worker serves."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from cpu_decode.llama import Batch, Context
from cpu_decode.state import StateBlob

CALIBRATION_TOKENS = 256


class Speed(NamedTuple):
    """Of a local prefill that has the machine to itself, with the sample behind it, and of injection."""

    prefill_tokens_per_s: float
    prefill_basis: str
    inject_tokens_per_s: float


def measure(context: Context, batch: Batch) -> Speed:
    """Time one prefill and one injection, after one that warms the machine up; cells are left as they were.

    Call it on the thread that computes, and on no other: OpenMP keeps a team for each thread that has computed, and
    stops spinning at barriers once the teams outnumber the cores, which nearly doubles the time of a token.
    """
    count = min(CALIBRATION_TOKENS, batch.capacity, context.num_cells)
    prompt = [token % context.model.vocab_size for token in range(count)]
    for _ in range(2):
        began = time.monotonic_ns()
        batch.clear()
        batch.add(0, 0, prompt, want_logits=True)
        context.decode(batch)
        context.logits(count - 1)
        seconds = (time.monotonic_ns() - began) / 1e9
        state = np.frombuffer(context.state(0), np.uint8)
        context.trim(0, 0)
        began = time.monotonic_ns()
        context.inject(StateBlob(state, state.size, 0, count), 0)
        inject_tokens_per_s = count * 1e9 / (time.monotonic_ns() - began)
        context.trim(0, 0)
    basis = f"calibration at start: {count} tokens in {seconds:.2f} s"
    return Speed(count / seconds, basis, inject_tokens_per_s)
