"""The decode workers that the proxy knows: the one that the cluster file pins, and those that announce themselves."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator, Sequence

import structlog

from proxy.block_index import Held, held
from proxy.decode_node import DecodeNode
from transfer.blocks import EXACT
from transfer.errors import ProtocolError
from transfer.keys import ClientKeys
from transfer.messages import Announce, Status

MAX_WORKERS = 64
# A worker announces itself every second; one that is lost and silent for this long is forgotten.
EXPIRE_S = 5.0
SWEEP_S = 0.5
_ENDPOINT = re.compile(r"tcp://[A-Za-z0-9._:\[\]-]{1,255}:[0-9]{1,5}")

log = structlog.get_logger()


class DecodePool:
    """Clients to all decode workers, by name. ``pinned`` stays for good, announced ones while they are heard of.

    With ``keys`` their sessions speak CURVE. :meth:`run` keeps in touch with them.
    """

    def __init__(self, pinned: DecodeNode | None, keys: ClientKeys | None = None) -> None:
        self.pinned = pinned
        self.nodes: dict[str, DecodeNode] = {}
        self._keys = keys
        self._sessions: dict[str, asyncio.Task[None]] = {}
        self._heard_ns: dict[str, int] = {}

    def __iter__(self) -> Iterator[DecodeNode]:
        return iter(self.nodes.values())

    @property
    def up(self) -> bool:
        """Whether some worker takes requests."""
        return any(node.takes_requests for node in self)

    @property
    def down_reason(self) -> str:
        """Why none does."""
        if not self.nodes:
            return "no decode worker has announced itself"
        return "; ".join(f"{node.name}: {node.away_reason}" for node in self if not node.takes_requests)

    @property
    def failing(self) -> bool:
        """Whether those that take requests have failed too often lately."""
        now_ns = time.monotonic_ns()
        return self.up and all(node.breaker.failing(now_ns) for node in self if node.takes_requests)

    @property
    def any_status(self) -> Status | None:
        """The status of some worker that is up."""
        return next((node.status for node in self if node.status), None)

    @property
    def sequence_cells(self) -> int:
        """The fewest cells that a worker has for one sequence, where cells are divided among them; 0: nowhere."""
        welcomes = [node.welcome for node in self if node.up and node.welcome]
        divided = [each.sequence_cells for each in welcomes if 0 < each.sequence_cells < each.num_cells]
        return min(divided, default=0)

    def held(self, node: DecodeNode, prompt: Sequence[int], tenant: str) -> Held:
        """How much of ``prompt`` ``node`` has as exact KV for ``tenant``, the shared server included."""
        others = [other.index for other in self if other is not node]
        return held(prompt, node.tenant(tenant), EXACT, node.welcome, node.index, others)

    def another(self, avoid: frozenset[str]) -> bool:
        """Whether some worker that is not in ``avoid`` takes requests."""
        return any(node.takes_requests for node in self if node.name not in avoid)

    def heard(self, announce: Announce) -> None:
        """Take in that a worker is there; :class:`ProtocolError` if it cannot be one, or there are too many."""
        node = self.nodes.get(announce.worker)
        node = node or next((node for node in self if node.calls_itself(announce.worker)), None)
        if node is None:
            if not _ENDPOINT.fullmatch(announce.control_endpoint):
                raise ProtocolError(f"{announce.control_endpoint!r} is no endpoint of a worker")
            if len(self.nodes) >= MAX_WORKERS:
                raise ProtocolError(f"{MAX_WORKERS} decode workers are known already")
            log.info("a decode worker announces itself", worker=announce.worker, endpoint=announce.control_endpoint)
            node = DecodeNode(announce.control_endpoint, self._keys, announce.worker)
            self._add(node)
        node.announced_draining = announce.draining
        self._heard_ns[node.name] = time.monotonic_ns()

    async def run(self) -> None:
        """Keep a session with every worker, and forget those that are gone, until cancelled."""
        if self.pinned is not None:
            self._add(self.pinned)
        try:
            while True:
                await asyncio.sleep(SWEEP_S)
                self._forget_the_gone()
        finally:
            for session in self._sessions.values():
                session.cancel()
            await asyncio.gather(*self._sessions.values(), return_exceptions=True)

    def _add(self, node: DecodeNode) -> None:
        self.nodes[node.name] = node
        self._sessions[node.name] = asyncio.create_task(node.run())

    def _forget_the_gone(self) -> None:
        oldest_ns = time.monotonic_ns() - int(EXPIRE_S * 1e9)
        for name, heard_ns in list(self._heard_ns.items()):
            node = self.nodes[name]
            gone = heard_ns < oldest_ns and not node.up
            if gone or self._is_pinned_twice(node):
                del self._heard_ns[name]
                if node is not self.pinned:
                    log.warning("forgets a decode worker", worker=name, reason=node.down_reason)
                    del self.nodes[name]
                    self._sessions.pop(name).cancel()

    def _is_pinned_twice(self, node: DecodeNode) -> bool:
        """Whether it is the pinned one under another address, as its welcome shows, and serves nothing now."""
        pinned, welcome = self.pinned, node.welcome
        if pinned is None or node is pinned or welcome is None or node.conversations:
            return False
        return pinned.up and pinned.calls_itself(welcome.worker)
