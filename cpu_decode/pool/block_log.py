"""Which blocks a worker has, in which tier, and what has changed since somebody last asked."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterable

from transfer.blocks import index_key
from transfer.messages import IndexUpdate

# The best one first.
TIERS = ("cells", "ram", "disk", "shared")
MAX_CHANGES = 65_536
# A full update of so many blocks takes 2 MB.
MAX_BLOCKS = 200_000


class BlockLog:
    """Counts who holds each block, by tier; every tier tells it, from threads of their own.

    Blocks are told apart by the first bytes of their names. Versions count the changes of a block's best tier.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders: dict[bytes, Counter[str]] = {}
        self._changes: deque[tuple[int, bytes]] = deque(maxlen=MAX_CHANGES)
        self.version = 0

    def add(self, tier: str, names: Iterable[bytes]) -> None:
        """``tier`` has ``names`` now; a tier may say so several times, and then takes it back as often."""
        self._count(tier, names, 1)

    def remove(self, tier: str, names: Iterable[bytes]) -> None:
        """``tier`` has ``names`` no more, or once less."""
        self._count(tier, names, -1)

    def since(self, version: int) -> IndexUpdate:
        """What has changed since ``version``; all there is where that is 0 or too long ago."""
        with self._lock:
            oldest = self._changes[0][0] - 1 if self._changes else self.version
            if 0 < version <= self.version and version >= oldest:
                changed = {key for at, key in self._changes if at > version}
                held = {key: tier for key in changed if (tier := self._best(key))}
                return IndexUpdate(
                    base_version=version,
                    version=self.version,
                    added=_by_tier(held),
                    removed=[key for key in changed if key not in held],
                )
            held = {key: tier for key in self._holders if (tier := self._best(key))}
            best_first = sorted(held.items(), key=lambda item: TIERS.index(item[1]))[:MAX_BLOCKS]
            return IndexUpdate(base_version=0, version=self.version, added=_by_tier(dict(best_first)))

    def _count(self, tier: str, names: Iterable[bytes], by: int) -> None:
        with self._lock:
            for key in map(index_key, names):
                before = self._best(key)
                holders = self._holders.setdefault(key, Counter())
                holders[tier] += by
                if holders[tier] <= 0:
                    del holders[tier]
                if not holders:
                    del self._holders[key]
                if self._best(key) != before:
                    self.version += 1
                    self._changes.append((self.version, key))

    def _best(self, key: bytes) -> str | None:
        holders = self._holders.get(key)
        return next((tier for tier in TIERS if tier in holders), None) if holders else None


def _by_tier(held: dict[bytes, str]) -> dict[str, list[bytes]]:
    by_tier: dict[str, list[bytes]] = defaultdict(list)
    for key, tier in held.items():
        by_tier[tier].append(key)
    return dict(by_tier)
