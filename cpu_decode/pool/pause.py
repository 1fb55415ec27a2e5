"""How long something that fails is left alone: twice as long each time."""

from __future__ import annotations

import time


class Pause:
    """Active after a failure, for ``least_s``, then twice that, and so on up to ``most_s``, until a success."""

    def __init__(self, least_s: float, most_s: float) -> None:
        self._least_s, self._most_s = least_s, most_s
        self._next_s = least_s
        self._until_ns = 0

    @property
    def active(self) -> bool:
        """Whether it is too early to try again."""
        return time.monotonic_ns() < self._until_ns

    def failed(self) -> float:
        """Begin the next pause; returns its length in seconds."""
        seconds = self._next_s
        self._until_ns = time.monotonic_ns() + int(seconds * 1e9)
        self._next_s = min(2 * seconds, self._most_s)
        return seconds

    def succeeded(self) -> None:
        """The next pause is a short one again."""
        self._next_s = self._least_s
