"""Requests for which there is no room yet: first come, first served, no more than so many, each until its deadline."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transfer.errors import CapacityError
from transfer.messages import Reserve


class Waiting(NamedTuple):
    """One of them: whose it is, and since when it waits (``monotonic_ns``)."""

    client: bytes
    reserve: Reserve
    since_ns: int

    @property
    def deadline_ns(self) -> int:
        """When it gives up."""
        return self.since_ns + self.reserve.deadline_ms * 1_000_000


class Line:
    """The requests that wait, at most ``max_queued``; owned by the I/O thread."""

    def __init__(self, max_queued: int) -> None:
        self._max_queued = max_queued
        self._waiting: dict[str, Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(list(self._waiting.values()))

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def join(self, waiting: Waiting) -> None:
        """Stand behind the others; raises :class:`CapacityError` if too many do."""
        if len(self._waiting) >= self._max_queued:
            raise CapacityError(
                f"{len(self._waiting)} requests wait for cells already, the limit is {self._max_queued} - at [decode] "
                "max_queued"
            )
        self._waiting[waiting.reserve.request_id] = waiting

    def first(self) -> Waiting | None:
        """Whose turn it is."""
        return next(iter(self._waiting.values()), None)

    def client(self, request_id: str) -> bytes | None:
        """Who waits for ``request_id``; None if nobody does."""
        waiting = self._waiting.get(request_id)
        return waiting.client if waiting else None

    def leave(self, request_id: str) -> None:
        """Wait no longer."""
        self._waiting.pop(request_id, None)


class Need(NamedTuple):
    """What a request takes, and for how many steps yet."""

    cells: int
    sequences: int
    steps: int


def steps_until_room(free_cells: int, free_sequences: int, running: Sequence[Need], line: Sequence[Need]) -> int:
    """After how many steps the last of ``line`` has room, if nobody ends early; 0 if it never has.

    Every running request ends after its steps and gives back what it took; each of ``line`` takes it in turn.
    """
    ends = [(need.steps, need.cells, need.sequences) for need in running]
    heapq.heapify(ends)
    now = 0
    for need in line:
        while need.cells > free_cells or need.sequences > free_sequences:
            if not ends:
                return 0
            now, cells, sequences = heapq.heappop(ends)
            free_cells += cells
            free_sequences += sequences
        free_cells -= need.cells
        free_sequences -= need.sequences
        heapq.heappush(ends, (now + need.steps, need.cells, need.sequences))
    return now
