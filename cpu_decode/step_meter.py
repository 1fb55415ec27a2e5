"""How fast steps have been: what a worker says of itself to those who choose between workers."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import NamedTuple

WINDOW_NS = 1_000_000_000


class Step(NamedTuple):
    """One step: ``sequences`` decoded with ``context_tokens`` tokens in all; ``plain``: without prefill and guesses."""

    ended_ns: int
    step_ns: int
    sequences: int
    context_tokens: int
    new_tokens: int
    plain: bool


class Pace(NamedTuple):
    """Means over the steps of the last second, or, but for the rate, of the last step before it."""

    tokens_per_s: float = 0.0
    step_ns: int = 0
    sequences: float = 0.0
    context_tokens: float = 0.0


class StepMeter:
    """The steps of the last second; one thread adds to it, others ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: deque[Step] = deque()
        self._last: Step | None = None

    def add(self, step: Step) -> None:
        """Note a step."""
        with self._lock:
            self._steps.append(step)
            self._forget(step.ended_ns)
            if step.plain:
                self._last = step

    def pace(self, now_ns: int | None = None) -> Pace:
        """How it went in the second before ``now_ns``."""
        with self._lock:
            self._forget(time.monotonic_ns() if now_ns is None else now_ns)
            steps, last = list(self._steps), self._last
        rate = sum(step.new_tokens for step in steps) * 1e9 / WINDOW_NS
        plain = [step for step in steps if step.plain] or ([last] if last else [])
        if not plain:
            return Pace(rate)
        count = len(plain)
        return Pace(
            rate,
            sum(step.step_ns for step in plain) // count,
            sum(step.sequences for step in plain) / count,
            sum(step.context_tokens for step in plain) / count,
        )

    def _forget(self, now_ns: int) -> None:
        while self._steps and self._steps[0].ended_ns < now_ns - WINDOW_NS:
            self._steps.popleft()
