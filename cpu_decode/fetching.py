"""Requests whose KV is being fetched from below RAM: they are admitted when it has come, or when it takes too long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from cpu_decode.pool.below import Fetch, Fetched
from cpu_decode.reuse import Missing, PrefixCache, Scope
from transfer.messages import Reserve

MOST_WAIT_NS = 5_000_000_000
# A shorter wait is not worth its bookkeeping, and a store that is slower than this is never asked again.
LEAST_WAIT_NS = 20_000_000
_SMOOTHING = 0.3


class Arriving(NamedTuple):
    """One of them: whose it is, where its blocks go, and when it goes on without."""

    client: bytes
    reserve: Reserve
    scope: Scope
    missing: Missing
    deadline_ns: int


class Fetching:
    """Owned by the I/O thread. ``prefill_tokens_per_s`` is how fast the worker computes prompts itself.

    A tier is read where a block comes back sooner than it would be computed and sent (:meth:`LowerTiers.paying`), and
    waited for as long as that would take: what is lost by a store that stalls is bounded by what it could have saved.
    """

    def __init__(self, prefixes: PrefixCache, prefill_tokens_per_s: Callable[[], float]) -> None:
        self._prefixes = prefixes
        self._prefill_tokens_per_s = prefill_tokens_per_s
        # Of KV from the wire, from the ticket on, vLLM's computing included; 0: none has come yet.
        self.arrival_tokens_per_s = 0.0
        self._arriving: dict[str, Arriving] = {}

    def __len__(self) -> int:
        return len(self._arriving)

    def begin(self, client: bytes, reserve: Reserve) -> bool:
        """Fetch what the tiers below may have for ``reserve``; False if it need not wait for anything."""
        scope = self._prefixes.scope(reserve)
        missing = self._prefixes.missing(reserve.prompt, scope)
        if scope is None or missing is None or reserve.request_id in self._arriving:
            return False
        size, below = self._prefixes.block_tokens, self._prefixes.below
        block_ns = size * 1e9 / self._tokens_per_s(reserve)
        tiers = below.paying(self._prefixes.block_bytes, block_ns)
        if not below.may_hold((names[0] for _, names in missing.chains), tiers):
            return False
        worth_ns = min(
            max(int(missing.num_blocks * block_ns), LEAST_WAIT_NS), MOST_WAIT_NS, reserve.deadline_ms * 10**6
        )
        deadline_ns = time.monotonic_ns() + worth_ns
        if not below.fetch(Fetch(reserve.request_id, missing.chains, tiers, deadline_ns)):
            return False
        self._arriving[reserve.request_id] = Arriving(client, reserve, scope, missing, deadline_ns)
        return True

    def end(self, fetched: Fetched) -> Arriving | None:
        """Take in what has come; returns the request that waited for it, None if it does no longer."""
        arriving = self._arriving.pop(fetched.request_id, None)
        if arriving is not None:
            self._prefixes.take_in(arriving.reserve.prompt, arriving.scope, arriving.missing.first, fetched)
        return arriving

    def late(self) -> list[Arriving]:
        """Those that have waited long enough; they wait no longer."""
        now = time.monotonic_ns()
        late = [arriving for arriving in self._arriving.values() if arriving.deadline_ns < now]
        for arriving in late:
            del self._arriving[arriving.reserve.request_id]
        return late

    def client(self, request_id: str) -> bytes | None:
        """Whose request waits; None if it does not."""
        arriving = self._arriving.get(request_id)
        return arriving.client if arriving else None

    def of(self, client: bytes) -> Iterator[str]:
        """The requests of ``client`` that wait."""
        return (request_id for request_id, arriving in self._arriving.items() if arriving.client == client)

    def forget(self, request_id: str) -> None:
        """It waits no longer; what comes for it is dropped."""
        self._arriving.pop(request_id, None)

    def arrived(self, num_tokens: int, took_ns: int) -> None:
        """KV of ``num_tokens`` tokens has come from the wire, ``took_ns`` after it was asked for."""
        if num_tokens >= self._prefixes.block_tokens:
            now = num_tokens * 1e9 / max(took_ns, 1)
            before = self.arrival_tokens_per_s or now
            self.arrival_tokens_per_s = before + _SMOOTHING * (now - before)

    def _tokens_per_s(self, reserve: Reserve) -> float:
        """How fast the prompt would be there without the tiers; guessed low, which tries them, until it is known."""
        by_wire = self.arrival_tokens_per_s if reserve.source == "kv" else 0.0
        return by_wire or self._prefill_tokens_per_s() or 1.0
