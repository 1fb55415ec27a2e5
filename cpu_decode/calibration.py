"""How fast this host computes a prompt and copies KV into cells, timed once before a worker serves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from cpu_decode.llama import Batch, Context
from cpu_decode.state import StateBlob

CALIBRATION_TOKENS = 256
# Timing batches is for speculation, and must not keep a worker from serving for long.
ROWS_S = 2.0
REPEATS = 3


class Speed(NamedTuple):
    """Of a local prefill that has the machine to itself, with the sample behind it, and of injection.

    ``row_ns`` is how long a batch takes by its number of rows, behind as many tokens as were prefilled.
    """

    prefill_tokens_per_s: float
    prefill_basis: str
    inject_tokens_per_s: float
    row_ns: dict[int, float]


def measure(context: Context, batch: Batch, rows: Sequence[int] = ()) -> Speed:
    """Time one prefill, one injection and batches of ``rows``, ascending; cells are left as they were.

    Call it on the thread that computes, and on no other: OpenMP keeps a team for each thread that has computed, and
    stops spinning at barriers once the teams outnumber the cores, which nearly doubles the time of a token.
    """
    count = min(CALIBRATION_TOKENS, batch.capacity, context.sequence_cells)
    prompt = [token % context.model.vocab_size for token in range(count)]
    # The first warms the machine up.
    for _ in range(2):
        began = time.monotonic_ns()
        batch.clear()
        batch.add(0, 0, prompt, want_logits=True)
        context.decode(batch)
        context.logits(count - 1)
        seconds = (time.monotonic_ns() - began) / 1e9
        state = context.state(0)
        context.trim(0, 0)
        began = time.monotonic_ns()
        context.inject(StateBlob(state, state.size, 0, count), 0)
        inject_tokens_per_s = count * 1e9 / (time.monotonic_ns() - began)
        context.trim(0, 0)
    row_ns = time_rows(context, batch, rows, StateBlob(state, state.size, 0, count)) if rows else {}
    basis = f"calibration at start: {count} tokens in {seconds:.2f} s"
    return Speed(count / seconds, basis, inject_tokens_per_s, row_ns)


def time_rows(context: Context, batch: Batch, rows: Sequence[int], before: StateBlob) -> dict[int, float]:
    """How long a batch takes, in ns by its number of rows, behind the tokens of ``before``; ``rows`` ascend.

    Larger ones are left out once ``ROWS_S`` are spent, or where cells end.
    """
    row_ns = {}
    began = time.monotonic()
    context.inject(before, 0)
    for count in rows:
        if before.num_tokens + count > context.sequence_cells or time.monotonic() - began > ROWS_S:
            break
        times = []
        for _ in range(REPEATS):
            batch.clear()
            batch.add(0, before.num_tokens, list(range(count)), want_logits=count)
            step_began = time.monotonic_ns()
            context.decode(batch)
            context.live_logits(count - 1)
            times.append(time.monotonic_ns() - step_began)
            context.trim(0, before.num_tokens)
        row_ns[count] = float(min(times))
    context.trim(0, 0)
    return row_ns
