"""Why blocks leave a tier, or never get into it: counted by reason, for those who size the tiers.

``probation``: made room, never used again. ``capacity``: made room although it had been used again. ``superseded``: a
longer block has its tokens now. ``foreign``: made room, was another model's. ``corrupt``: not what was written.
``gone``: somebody else deleted it, ``isthmus pool purge`` or a shared server that was full or kept it long enough.
``forgotten``: still there, but its name is no longer remembered.

``busy``: everything else was in use. ``too_large``: larger than the tier. ``paused``: the store is left alone after a
failure. ``behind``: too much was waiting to be written. ``failed``: writing it failed.
``torn``: its writer was killed in the middle.
"""

from __future__ import annotations

from collections import Counter


class Losses:
    """One tier's counts. A reason is counted by one thread."""

    def __init__(self) -> None:
        self.evicted: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    @property
    def evictions(self) -> int:
        """Blocks that have left."""
        return sum(self.evicted.values())
