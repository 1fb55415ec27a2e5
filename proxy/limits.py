"""Who runs next, how many run and how many wait: the rest is told to come back.

Slots are shared fairly between API keys, by tokens, as the Virtual Token Counter does it (Sheng et al., "Fairness in
Serving Large Language Models", OSDI 2024), which is start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) where
a request's cost is known only at its end. Every key has a counter of the tokens that it was given, over its weight; a
free slot goes to the key with the smallest one. A prompt is charged, by a guess, with the slot, the rest when the
request ends. A key that had nothing waiting comes back at the virtual time, not with what it left unused. So the
counters of two keys that always have requests waiting never differ by more than what all slots' requests may take.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from proxy.api_keys import NOBODY, ApiKey
from proxy.failures import RETRY_AFTER_S, RateLimitError
from transfer.errors import CapacityError, RequestError

MAX_RETRY_AFTER_S = 60
# How much of what was learned of the time that a slot is held each request replaces.
_FORGET = 0.1


class OverloadError(CapacityError):
    """All slots are taken and no more may wait; a slot should be free in ``retry_after_s``."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class _Flow:
    """The requests of one key: ``counter`` is the tokens that they were charged, over its weight."""

    def __init__(self, key: ApiKey) -> None:
        self.key = key
        self.running = 0
        self.counter = 0.0
        self.waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    @property
    def at_limit(self) -> bool:
        return 0 < self.key.limits.max_running <= self.running

    def charge(self, tokens: int) -> None:
        self.counter += tokens / self.key.limits.weight


class Slot:
    """Permission to run, for which its key has been charged ``charged_tokens``."""

    def __init__(self, flow: _Flow, charged_tokens: int) -> None:
        self._flow = flow
        self._charged_tokens = charged_tokens

    def settle(self, tokens: int) -> None:
        """The request took so many tokens, prompt and answer: charge what is missing, or give back."""
        self._flow.charge(tokens - self._charged_tokens)
        self._charged_tokens = tokens


class Admission:
    """At most ``max_running`` requests hold a slot and ``max_queued`` wait for one.

    One key may have no more requests waiting than there is room left for others': half of ``max_queued`` if it is alone
    (the dynamic threshold of Choudhury and Hahne, 1998). Everyone, where there are no keys, may have all.
    """

    def __init__(self, max_running: int, max_queued: int) -> None:
        self.max_running = max_running
        self.max_queued = max_queued
        self.running = 0
        self.queued = 0
        self._flows: dict[str, _Flow] = {}
        self._virtual_time = 0.0
        self._held_s = 0.0
        self._request_ids: set[str] = set()

    @asynccontextmanager
    async def slot(self, request_id: str, key: ApiKey = NOBODY, guessed_tokens: int = 0) -> AsyncIterator[Slot]:
        """Hold a slot for the body; ``key`` is charged ``guessed_tokens`` with it.

        Raises at once :class:`OverloadError` when the queue is full, :class:`RateLimitError` when the key's own part of
        it is, and :class:`RequestError` when the id is in use.
        """
        if request_id in self._request_ids:
            raise RequestError(f"X-Request-Id {request_id!r} belongs to a request that is still open", "X-Request-Id")
        flow = self._flows.setdefault(key.name, _Flow(key))
        self._request_ids.add(request_id)
        try:
            await self._enter(flow, guessed_tokens)
            began_s = time.monotonic()
            try:
                yield Slot(flow, guessed_tokens)
            finally:
                self._learn(time.monotonic() - began_s)
                self._leave(flow)
        finally:
            self._request_ids.discard(request_id)

    async def _enter(self, flow: _Flow, guessed_tokens: int) -> None:
        if not flow.waiting:
            # It has nothing left over from when it wanted nothing.
            flow.counter = max(flow.counter, self._virtual_time)
        if self.running < self.max_running and not flow.at_limit and not flow.waiting:
            self._run(flow, guessed_tokens)
            return
        self._require_room(flow)
        granted = asyncio.get_running_loop().create_future()
        turn = (granted, guessed_tokens)
        flow.waiting.append(turn)
        self.queued += 1
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self._leave(flow)
            elif turn in flow.waiting:
                flow.waiting.remove(turn)
                self.queued -= 1
            raise

    def _require_room(self, flow: _Flow) -> None:
        left = self.max_queued - self.queued
        if left <= 0:
            message = f"{self.running} requests run and {self.queued} wait; try again later"
            raise OverloadError(message, self._retry_after_s())
        if flow.key.name and len(flow.waiting) >= left:
            message = f"{len(flow.waiting)} requests wait with this API key; try again when some have run"
            raise RateLimitError(message, self._retry_after_s())

    def _run(self, flow: _Flow, guessed_tokens: int) -> None:
        self._virtual_time = max(self._virtual_time, flow.counter)
        flow.charge(guessed_tokens)
        flow.running += 1
        self.running += 1

    def _leave(self, flow: _Flow) -> None:
        if flow.at_limit:
            # While its limit held it back others went on: that is not theirs to give back.
            flow.counter = max(flow.counter, self._virtual_time)
        flow.running -= 1
        self.running -= 1
        self._let_run()
        if not self.running:
            self._virtual_time = max(each.counter for each in self._flows.values())

    def _let_run(self) -> None:
        while self.running < self.max_running:
            ready = [flow for flow in self._flows.values() if flow.waiting and not flow.at_limit]
            if not ready:
                return
            flow = min(ready, key=lambda each: each.counter)
            granted, guessed_tokens = flow.waiting.popleft()
            self.queued -= 1
            if not granted.cancelled():
                self._run(flow, guessed_tokens)
                granted.set_result(None)

    def _learn(self, held_s: float) -> None:
        self._held_s += (held_s - self._held_s) * (_FORGET if self._held_s else 1.0)

    def _retry_after_s(self) -> int:
        """When, at the pace of late, those that wait will have run."""
        wait_s = self.queued * self._held_s / self.max_running
        return min(max(math.ceil(wait_s), RETRY_AFTER_S), MAX_RETRY_AFTER_S)
