"""How much each API key may ask for in a minute."""

from __future__ import annotations

import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from proxy.api_keys import ApiKey
from proxy.failures import RateLimitError


class Rates:
    """Requests and tokens a minute for each key, 0 for any number, where the key's own line does not say otherwise.

    A request's tokens are counted as they become known: a guess at its prompt at once, the rest when it ends. A key
    that has used up its minute is refused until the next one begins.
    """

    def __init__(self, requests_per_minute: int, tokens_per_minute: int) -> None:
        self._limiter = FixedWindowRateLimiter(MemoryStorage())
        self._default_requests = requests_per_minute
        self._default_tokens = tokens_per_minute

    def admit(self, key: ApiKey) -> None:
        """Count a request of ``key``; :class:`RateLimitError` if it has none left, or no tokens."""
        tokens, requests = self._tokens(key), self._requests(key)
        if tokens and not self._limiter.test(tokens, "tokens", key.name):
            raise self._refusal(tokens, "tokens", key)
        if requests and not self._limiter.hit(requests, "requests", key.name):
            raise self._refusal(requests, "requests", key)

    def spend(self, key: ApiKey, num_tokens: int) -> None:
        """Count tokens of ``key``."""
        tokens = self._tokens(key)
        if tokens and num_tokens > 0:
            self._limiter.hit(tokens, "tokens", key.name, cost=num_tokens)

    def headers(self, key: ApiKey) -> dict[str, str]:
        """What ``key`` has left of its minute, as OpenAI says it; nothing where it may ask for any number."""
        found = {}
        for what, limit in (("requests", self._requests(key)), ("tokens", self._tokens(key))):
            if limit:
                left = self._limiter.get_window_stats(limit, what, key.name)
                found[f"X-RateLimit-Limit-{what.title()}"] = str(limit.amount)
                found[f"X-RateLimit-Remaining-{what.title()}"] = str(left.remaining)
                found[f"X-RateLimit-Reset-{what.title()}"] = f"{max(0, round(left.reset_time - time.time()))}s"
        return found

    def _tokens(self, key: ApiKey) -> RateLimitItemPerMinute | None:
        return _item(key.limits.tokens_per_minute, self._default_tokens)

    def _requests(self, key: ApiKey) -> RateLimitItemPerMinute | None:
        return _item(key.limits.requests_per_minute, self._default_requests)

    def _refusal(self, limit: RateLimitItemPerMinute, what: str, key: ApiKey) -> RateLimitError:
        reset_s = self._limiter.get_window_stats(limit, what, key.name).reset_time - time.time()
        return RateLimitError(f"more than {limit.amount} {what} in a minute with this API key", max(1, round(reset_s)))


def _item(own: int | None, default: int) -> RateLimitItemPerMinute | None:
    amount = default if own is None else own
    return RateLimitItemPerMinute(amount) if amount else None
