"""What a route not taken would have cost: pure estimates with the sample behind them."""

from __future__ import annotations

from typing import NamedTuple

from transfer.messages import Status

_NS_PER_S = 1_000_000_000


class Estimate(NamedTuple):
    """A duration and where the number comes from."""

    ns: int
    basis: str


def cpu_prefill(prompt_tokens: int, status: Status | None) -> Estimate | None:
    """How long the decode worker's own prefill would take; None until it has measured its speed."""
    if status is None or status.prefill_tokens_per_s <= 0:
        return None
    return Estimate(round(prompt_tokens / status.prefill_tokens_per_s * _NS_PER_S), status.prefill_basis)
