"""Named workloads: what is asked, how it comes, and when an answer is good enough."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple


class Workload(NamedTuple):
    """Requests of one kind. Tokens are means, around which lengths vary evenly by a share of ``spread``.

    ``shared_tokens`` of each prompt are the same for all requests.
    ``together``: every round's requests come at once, and the next round when the last answer is done; otherwise each
    client asks again as soon as it has its answer. An answer is good if its first token comes within ``ttft_slo_s``
    and the others follow ``tpot_slo_s`` apart on average.
    """

    name: str
    prompt_tokens: int
    output_tokens: int
    ttft_slo_s: float
    tpot_slo_s: float
    shared_tokens: int = 0
    together: bool = False
    spread: float = 0.25


class Ask(NamedTuple):
    """One request, in tokens."""

    prompt_tokens: int
    output_tokens: int
    shared_tokens: int


# 150 ms a token is five words a second: who reads does not wait.
WORKLOADS = (
    Workload("short chat", 256, 192, ttft_slo_s=2.0, tpot_slo_s=0.15),
    Workload("long document", 7000, 96, ttft_slo_s=10.0, tpot_slo_s=0.15),
    Workload("long output", 384, 768, ttft_slo_s=2.0, tpot_slo_s=0.15),
    Workload("shared prefix", 3072, 128, ttft_slo_s=3.0, tpot_slo_s=0.15, shared_tokens=2560),
    Workload("burst", 1024, 128, ttft_slo_s=5.0, tpot_slo_s=0.15, together=True),
)

# The same kinds of requests for a small model on a few cores: `measure crossover` in its quick profile.
QUICK_WORKLOADS = (
    Workload("short chat", 64, 24, ttft_slo_s=2.0, tpot_slo_s=0.15, spread=0.0),
    Workload("long document", 256, 8, ttft_slo_s=4.0, tpot_slo_s=0.15, spread=0.0),
    Workload("long output", 32, 48, ttft_slo_s=2.0, tpot_slo_s=0.15, spread=0.0),
    Workload("shared prefix", 256, 16, ttft_slo_s=2.0, tpot_slo_s=0.15, shared_tokens=192, spread=0.0),
    Workload("burst", 128, 16, ttft_slo_s=3.0, tpot_slo_s=0.15, together=True, spread=0.0),
)


def asks(workload: Workload, client: int, rounds: int) -> Iterator[Ask]:
    """The ``rounds`` requests of one client: the same ones on every call."""
    chosen = random.Random(f"{workload.name} {client}")  # noqa: S311 - lengths, not secrets
    own_tokens = workload.prompt_tokens - workload.shared_tokens
    for _ in range(rounds):
        yield Ask(
            workload.shared_tokens + _around(own_tokens, workload.spread, chosen),
            _around(workload.output_tokens, workload.spread, chosen),
            workload.shared_tokens,
        )


def _around(mean: int, spread: float, chosen: random.Random) -> int:
    return max(round(mean * chosen.uniform(1 - spread, 1 + spread)), 2)
