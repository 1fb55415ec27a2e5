"""A node that fails again and again is left out for a while: a circuit breaker."""

from __future__ import annotations

FAILURES = 3
FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
_NS_PER_S = 1_000_000_000


class Breaker:
    """Counts failures in a row. From the ``FAILURES``-th on the node pauses, twice as long after each further one.

    After a pause one request may try the node: its success ends the matter, its failure starts the next pause. Times
    are the caller's, in ns on one monotonic clock.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._closed_until_ns = 0

    def failing(self, now_ns: int) -> bool:
        """Whether the node had better be left out."""
        return now_ns < self._closed_until_ns

    def tried(self, now_ns: int) -> None:
        """A request goes there; while a node is on probation, others stay away until its fate is known."""
        self._pause(now_ns)

    def failed(self, now_ns: int) -> None:
        """A request failed because of the node."""
        self._failures += 1
        self._pause(now_ns)

    def succeeded(self) -> None:
        """A request was served."""
        self._failures = self._closed_until_ns = 0

    def _pause(self, now_ns: int) -> None:
        if self._failures >= FAILURES:
            doublings = min(self._failures - FAILURES, 16)
            self._closed_until_ns = now_ns + int(min(FIRST_PAUSE_S * 2**doublings, MAX_PAUSE_S) * _NS_PER_S)
