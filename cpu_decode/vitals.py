"""How a worker is: the part of its Status that its requests, its engine and its power meter know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from cpu_decode.batching import Batching
from cpu_decode.reservations import Reservations
from transfer.messages import Status


class Power(TypedDict):
    """The fields of Status that speak of power."""

    package_watts: float | None
    dram_watts: float | None
    power_of: str


def status(promised: Reservations, batching: Batching, weights_bytes: int) -> Status:
    """Cells, prefixes, pace and guesses of a worker, nameless yet, whose steps read ``weights_bytes`` beside KV."""
    pace = batching.meter.pace()
    step_bytes = weights_bytes + pace.context_tokens * promised.prefixes.cell_bytes
    return Status(
        worker="",
        used_cells=promised.admission.used_cells,
        num_cells=promised.admission.num_cells,
        running_sequences=batching.running_sequences,
        reserved_sequences=promised.admission.admitted,
        max_sequences=promised.admission.max_sequences,
        landing_bytes=promised.pool.in_use * promised.pool.buffer_bytes + batching.gathered_bytes,
        prefill_tokens_per_s=batching.prefill_tokens_per_s,
        prefill_basis=batching.prefill_basis,
        retained_bytes=promised.prefixes.used_bytes,
        retained_sequences=promised.prefixes.num_prefixes,
        prefix_hits=promised.prefixes.hits,
        reused_tokens=promised.prefixes.reused_tokens,
        preempted_sequences=batching.preempted_sequences,
        decode_tokens_per_s=pace.tokens_per_s,
        step_ns=pace.step_ns,
        step_sequences=pace.sequences,
        step_context_tokens=pace.context_tokens,
        step_read_bytes_per_s=step_bytes * 1e9 / pace.step_ns if pace.step_ns else 0.0,
        drafted_tokens=batching.drafted_tokens,
        accepted_tokens=batching.accepted_tokens,
        tiers=promised.prefixes.tiers(promised.admission.used_cells, promised.admission.num_cells),
    )


def power(watts: Mapping[str, float]) -> Power:
    """``watts`` by the names of what draws them, packages and their memory summed up."""
    return Power(package_watts=_sum(watts, "package"), dram_watts=_sum(watts, "dram"), power_of=", ".join(watts))


def _sum(watts: Mapping[str, float], kind: str) -> float | None:
    """Watts of the counters of that kind; None if there are none."""
    found = [value for name, value in watts.items() if name.startswith(kind)]
    return round(sum(found), 2) if found else None
