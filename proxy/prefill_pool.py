"""The prefill nodes that the cluster file names: which of them answer, and what all of them are busy with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Iterator

from proxy.load import Occupancy
from proxy.prefill_node import PrefillNode


class PrefillPool:
    """Clients to all ``nodes``, by name, in the file's order; :meth:`run` keeps in touch with them.

    ``occupancy`` is of all of them together.
    """

    def __init__(self, nodes: Iterable[PrefillNode]) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.occupancy = Occupancy()

    def __iter__(self) -> Iterator[PrefillNode]:
        return iter(self.nodes.values())

    @property
    def up(self) -> bool:
        """Whether some node answers."""
        return any(node.up for node in self)

    @property
    def failing(self) -> bool:
        """Whether those that answer have failed too often lately."""
        now_ns = time.monotonic_ns()
        return self.up and all(node.breaker.failing(now_ns) for node in self if node.up)

    @property
    def first(self) -> PrefillNode:
        """The first one that answers, or of all."""
        return next((node for node in self if node.up), next(iter(self)))

    def without(self, avoid: Collection[str]) -> list[PrefillNode]:
        """Those that answer and are not to be avoided; of these none that fails, if some do not."""
        wanted = [node for node in self if node.up and node.name not in avoid]
        now_ns = time.monotonic_ns()
        return [node for node in wanted if not node.breaker.failing(now_ns)] or wanted

    async def run(self) -> None:
        """Poll all of them until cancelled."""
        async with asyncio.TaskGroup() as polls:
            for node in self:
                polls.create_task(node.run())
