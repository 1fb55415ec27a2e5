"""How good decisions were: what the very same request took by other routes, forced or as a shadow."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from proxy.costs import Average
from proxy.ledger import Entry
from proxy.router import Route

MAX_REQUESTS = 1024
# A prompt of which more than this was cached says nothing about one of which nothing was.
MAX_CACHED_SHARE = 0.05


class Regret(NamedTuple):
    """The request of ledger entry ``seq`` took ``ns`` longer than by the best route that is known, ``best_ns``."""

    seq: int
    ns: int
    best_ns: int


class _Known:
    def __init__(self) -> None:
        self.took_ns: dict[Route, Average] = {}
        # The last one whose route the policy chose, and whether it has been judged.
        self.chosen: tuple[int, int] | None = None
        self.judged = False


class Regrets:
    """What the last ``MAX_REQUESTS`` different requests took, by route. Same prompt and as long an answer: the same."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, _Known] = OrderedDict()

    def learn(self, entry: Entry, prompt: Sequence[int]) -> Regret | None:
        """Take in a closed entry; what that shows of the last request like it whose route the policy chose, once."""
        if entry.status != "ok" or entry.failed_over or entry.route is None or not is_fresh(entry):
            return None
        known = self._of(entry, prompt)
        took_ns = entry.served_ns
        known.took_ns.setdefault(entry.route, Average()).observe(took_ns)
        if entry.reason not in ("forced", "shadow"):
            known.chosen, known.judged = (entry.seq, took_ns), False
        if known.chosen is None or known.judged or len(known.took_ns) < 2:
            return None
        known.judged = True
        seq, chosen_ns = known.chosen
        best_ns = round(min(average.value or 0 for average in known.took_ns.values()))
        return Regret(seq, max(0, chosen_ns - best_ns), best_ns)

    def _of(self, entry: Entry, prompt: Sequence[int]) -> _Known:
        key = blake2b(np.asarray(prompt, np.int32).tobytes(), digest_size=16)
        key.update(f"{entry.model} {entry.completion_tokens} {entry.decision and entry.decision.ask.choices}".encode())
        known = self._known.setdefault(key.digest(), _Known())
        self._known.move_to_end(key.digest())
        while len(self._known) > MAX_REQUESTS:
            self._known.popitem(last=False)
        return known


def is_fresh(entry: Entry) -> bool:
    """Whether (nearly) all of the prompt was computed for this request."""
    return entry.cached_tokens <= MAX_CACHED_SHARE * entry.prompt_tokens
