"""What a route not taken would have cost: pure estimates with the sample behind them."""

from __future__ import annotations

from typing import NamedTuple

from transfer.messages import Status

_NS_PER_S = 1_000_000_000


# How much of what was learned before each new observation is forgotten.
FORGET = 0.1


class PrefillTime:
    """What vLLM's prefills take: a line through fixed cost and cost of a new token, by least squares over the past.

    Each observation weighs ``1 - FORGET`` of the one after it.
    """

    def __init__(self) -> None:
        self._weight = self._tokens = self._ns = self._tokens_tokens = self._tokens_ns = 0.0

    def observe(self, new_tokens: int, took_ns: int) -> None:
        """Learn from a prefill that computed ``new_tokens``."""
        keep = 1 - FORGET
        self._weight = keep * self._weight + 1
        self._tokens = keep * self._tokens + new_tokens
        self._ns = keep * self._ns + took_ns
        self._tokens_tokens = keep * self._tokens_tokens + new_tokens * new_tokens
        self._tokens_ns = keep * self._tokens_ns + new_tokens * took_ns

    def ns(self, new_tokens: int) -> int | None:
        """What ``new_tokens`` would take; None before the first observation."""
        if not self._weight:
            return None
        mean_tokens, mean_ns = self._tokens / self._weight, self._ns / self._weight
        spread = self._tokens_tokens / self._weight - mean_tokens**2
        # All prompts of one length say nothing about a fixed cost.
        slope = mean_ns / max(mean_tokens, 1.0)
        if spread > 1:
            steepest = slope
            slope = (self._tokens_ns / self._weight - mean_tokens * mean_ns) / spread
            slope = min(max(slope, 0.0), steepest)
        return round(mean_ns + slope * (new_tokens - mean_tokens))


class Estimate(NamedTuple):
    """A duration and where the number comes from."""

    ns: int
    basis: str


def cpu_prefill(prompt_tokens: int, status: Status | None) -> Estimate | None:
    """How long the decode worker's own prefill would take; None until it has measured its speed."""
    if status is None or status.prefill_tokens_per_s <= 0:
        return None
    return Estimate(round(prompt_tokens / status.prefill_tokens_per_s * _NS_PER_S), status.prefill_basis)
