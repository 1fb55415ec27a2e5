"""How much each API key may ask for in a minute."""

from __future__ import annotations

import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from proxy.failures import RateLimitError


class Rates:
    """Requests and tokens a minute for each key, 0 for any number.

    A request's tokens are known when it ends: a key that has used up its minute is refused until the next one begins.
    """

    def __init__(self, requests_per_minute: int, tokens_per_minute: int) -> None:
        self._limiter = FixedWindowRateLimiter(MemoryStorage())
        self._requests = RateLimitItemPerMinute(requests_per_minute) if requests_per_minute else None
        self._tokens = RateLimitItemPerMinute(tokens_per_minute) if tokens_per_minute else None

    def admit(self, key: str) -> None:
        """Count a request of ``key``; :class:`RateLimitError` if it has none left, or no tokens."""
        if self._tokens and not self._limiter.test(self._tokens, "tokens", key):
            raise self._refusal(self._tokens, "tokens", key)
        if self._requests and not self._limiter.hit(self._requests, "requests", key):
            raise self._refusal(self._requests, "requests", key)

    def spend(self, key: str, tokens: int) -> None:
        """Count the tokens of a request that has ended."""
        if self._tokens and tokens:
            self._limiter.hit(self._tokens, "tokens", key, cost=tokens)

    def _refusal(self, limit: RateLimitItemPerMinute, what: str, key: str) -> RateLimitError:
        reset_s = self._limiter.get_window_stats(limit, what, key).reset_time - time.time()
        return RateLimitError(f"more than {limit.amount} {what} in a minute with this API key", max(1, round(reset_s)))
