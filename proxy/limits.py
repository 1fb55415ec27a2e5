"""How many requests run and how many wait: the rest is told to come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from transfer.errors import CapacityError, RequestError


class Admission:
    """At most ``max_running`` requests hold a slot and ``max_queued`` wait for one, first come, first served."""

    def __init__(self, max_running: int, max_queued: int) -> None:
        self.max_queued = max_queued
        self.running = 0
        self.queued = 0
        self._slots = asyncio.Semaphore(max_running)
        self._request_ids: set[str] = set()

    @asynccontextmanager
    async def slot(self, request_id: str) -> AsyncIterator[None]:
        """Hold a slot for the body.

        Raises :class:`CapacityError` when the queue is full and :class:`RequestError` when the id is in use.
        """
        if request_id in self._request_ids:
            raise RequestError(f"X-Request-Id {request_id!r} belongs to a request that is still open", "X-Request-Id")
        if self._slots.locked() and self.queued >= self.max_queued:
            raise CapacityError(f"{self.running} requests run and {self.queued} wait; try again later")
        self._request_ids.add(request_id)
        try:
            await self._wait()
            try:
                yield
            finally:
                self.running -= 1
                self._slots.release()
        finally:
            self._request_ids.discard(request_id)

    async def _wait(self) -> None:
        self.queued += 1
        try:
            await self._slots.acquire()
        finally:
            self.queued -= 1
        self.running += 1
