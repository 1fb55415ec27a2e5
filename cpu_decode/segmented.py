"""Which of many things to let go when bytes run out: a segmented LRU, which a scan does not empty.

Karedla, Love, Wherry: Caching strategies to improve disk system performance, IEEE Computer 27(3), 1994. What is new is
on probation, a second use protects it, and what is on probation goes first. Protected things come back on probation
when others have taken their share.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeVar

# The share of the bytes that things in second use may keep from new ones.
PROTECTED_SHARE = 0.8

K = TypeVar("K", bound=Hashable)


class SegmentedLru(Generic[K]):
    """Sizes in bytes, in the order in which they are to go; bounding them is the owner's part."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        # What goes first comes first.
        self._probation: OrderedDict[K, int] = OrderedDict()
        self._protected: OrderedDict[K, int] = OrderedDict()
        self._protected_bytes = 0

    def __contains__(self, item: K) -> bool:
        return item in self._probation or item in self._protected

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)

    def __iter__(self) -> Iterator[K]:
        """What goes first comes first."""
        yield from self._probation
        yield from self._protected

    def is_protected(self, item: K) -> bool:
        """Whether ``item`` has been used again, and has not fallen back since."""
        return item in self._protected

    def add(self, item: K, num_bytes: int) -> None:
        """Take ``item``, which is not known yet, on probation."""
        self._probation[item] = num_bytes
        self.used_bytes += num_bytes

    def use(self, items: Iterable[K]) -> None:
        """``items`` are used once more; the one to go first comes first."""
        for item in items:
            if item in self._probation:
                num_bytes = self._probation.pop(item)
                self._protected[item] = num_bytes
                self._protected_bytes += num_bytes
            self._protected.move_to_end(item)
        while self._protected_bytes > PROTECTED_SHARE * self.max_bytes:
            item, num_bytes = self._protected.popitem(last=False)
            self._protected_bytes -= num_bytes
            self._probation[item] = num_bytes

    def renew(self, items: Iterable[K]) -> None:
        """Make ``items`` the last ones to go of their kind; the one to go first comes first."""
        for item in items:
            self._segment(item).move_to_end(item)

    def remove(self, item: K) -> int:
        """Forget ``item``; returns its size, 0 if it is not known."""
        segment = self._segment(item)
        num_bytes = segment.pop(item, 0)
        self.used_bytes -= num_bytes
        self._protected_bytes -= num_bytes if segment is self._protected else 0
        return num_bytes

    def _segment(self, item: K) -> OrderedDict[K, int]:
        return self._protected if item in self._protected else self._probation
