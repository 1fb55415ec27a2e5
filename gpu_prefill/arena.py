"""Pieces of a fixed range of memory, of any size, given back in any order by any thread."""

from __future__ import annotations

from bisect import insort
from collections import deque

ALIGNMENT_BYTES = 256


class Arena:
    """Hands out offsets into ``size_bytes`` bytes, the first that fit. One thread takes."""

    def __init__(self, size_bytes: int) -> None:
        self._free = [(0, size_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES)]
        self._taken: dict[int, int] = {}
        # Whoever gives back may be a destructor in the middle of anything, so it takes no lock.
        self._returned: deque[int] = deque()

    @property
    def used_bytes(self) -> int:
        """What is taken, alignment included; for the thread that takes."""
        self._reclaim()
        return sum(self._taken.values())

    def take(self, size_bytes: int) -> int | None:
        """The offset of ``size_bytes`` bytes in one piece, at least 1; None if there is no such piece."""
        self._reclaim()
        wanted = -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        at = next((at for at, (_, size) in enumerate(self._free) if size >= wanted), None)
        if at is None:
            return None
        offset, size = self._free.pop(at)
        if size > wanted:
            self._free.insert(at, (offset + wanted, size - wanted))
        self._taken[offset] = wanted
        return offset

    def give_back(self, offset: int) -> None:
        """Return what :meth:`take` gave out."""
        self._returned.append(offset)

    def _reclaim(self) -> None:
        if not self._returned:
            return
        while self._returned:
            offset = self._returned.popleft()
            insort(self._free, (offset, self._taken.pop(offset)))
        joined = self._free[:1]
        for offset, size in self._free[1:]:
            last, last_size = joined[-1]
            if last + last_size == offset:
                joined[-1] = (last, last_size + size)
            else:
                joined.append((offset, size))
        self._free = joined
