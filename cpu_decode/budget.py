"""How many tokens of a local prompt may share a step with sequences that decode, so that their ITL stays bearable."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from functools import partial

# A step with prefill in it may take this many times as long as one without, or as long as nobody minds: 25 tokens a
# second are more than anybody reads.
MAX_SLOWDOWN = 1.75
STEP_NS = 40_000_000
# Fewer would starve the prompt, whatever the machine.
MIN_TOKENS = 2
# Share of the newest sample in a running mean.
WEIGHT = 0.2
# Steps without prefill that are remembered: while a prompt prefills there are none, and one of the last that the host
# held up must not count for long.
STEPS = 15


class PrefillBudget:
    """Learns from the duration of every step; owned by the engine's thread.

    Steps without prefill are known by their number of sequences, as the median of the last ones; what a prefilled token
    adds is measured at the number of tokens that was allowed last, so that a cost that is not linear finds its own
    balance.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._step_ns: defaultdict[int, deque[int]] = defaultdict(partial(deque, maxlen=STEPS))
        self._token_ns = 0.0

    def calibrate(self, prefill_tokens_per_s: float) -> None:
        """Start from the speed of a prefill that has the machine to itself."""
        self._token_ns = 1e9 / prefill_tokens_per_s

    def observe(self, decoding: int, prefill_tokens: int, step_ns: int) -> None:
        """Note a step over ``decoding`` sequences and ``prefill_tokens`` tokens of local prompts."""
        if not decoding:
            return
        if not prefill_tokens:
            self._step_ns[decoding].append(step_ns)
        elif base_ns := self._base_ns(decoding):
            token_ns = max(step_ns - base_ns, 1.0) / prefill_tokens
            self._token_ns += (WEIGHT if self._token_ns else 1.0) * (token_ns - self._token_ns)

    def tokens(self, decoding: int) -> int:
        """Tokens that the next step may prefill beside ``decoding`` sequences."""
        if not decoding:
            return self._max_tokens
        base_ns = self._base_ns(decoding)
        extra_ns = max(MAX_SLOWDOWN * base_ns, STEP_NS) - base_ns
        affordable = int(extra_ns / self._token_ns) if self._token_ns else 0
        return min(max(affordable, MIN_TOKENS), self._max_tokens)

    def _base_ns(self, decoding: int) -> float:
        """Duration of a step without prefill, of as many sequences or the nearest number seen; 0 if none was."""
        if not self._step_ns:
            return 0.0
        nearest = min(self._step_ns, key=lambda seen: abs(seen - decoding))
        return statistics.median(self._step_ns[nearest])
