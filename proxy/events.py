"""``GET /events``: what happens in the proxy, as server-sent events (https://html.spec.whatwg.org/#server-sent-events).

``entry`` is a ledger entry that has just been closed, with its number as the event's id; ``found``, without one, is
what was found out later about the entry ``seq`` (``regret_ns``, ``parity_kl``). ``nodes``, once a second, is what
``GET /nodes`` says, and shows that the connection stands; ``totals``, as often and if they have changed, what
``GET /totals`` says. A client that comes back with ``Last-Event-ID`` is told the entries that it has missed first; what
was found out about earlier ones meanwhile is in the ledger.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import msgspec
import structlog
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from proxy.hangup import until_gone
from proxy.ledger import Entry, Ledger
from proxy.store import Wanted
from transfer.errors import CapacityError

MAX_CLIENTS = 64
# A client that is so many events late, or takes none for so long, is dropped; it may come back where it was.
MAX_WAITING = 256
STALLED_S = 10.0
MAX_REPLAYED = 1000
EVERY_S = 1.0
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

log = structlog.get_logger()


class Inbox:
    """The events that one client has not been sent yet."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, bytes]] = deque()
        self.open = True
        self._news = asyncio.Event()

    def put(self, seq: int, event: bytes) -> None:
        """Take in an event, of entry ``seq`` or 0; a client that is too late is given up."""
        self.waiting.append((seq, event))
        if len(self.waiting) > MAX_WAITING:
            log.warning("a client of /events is too slow and is dropped")
            self.close()
        self._news.set()

    def close(self) -> None:
        """No more events."""
        self.open = False
        self._news.set()

    async def take(self) -> list[tuple[int, bytes]]:
        """All that wait, at least one unless it is closed."""
        while self.open and not self.waiting:
            self._news.clear()
            await self._news.wait()
        taken = list(self.waiting)
        self.waiting.clear()
        return taken


class Events:
    """Tells all clients what happens."""

    def __init__(self) -> None:
        self._inboxes: set[Inbox] = set()
        self._closed = False

    def closed_entry(self, entry: Entry) -> None:
        """A request was closed."""
        if self._inboxes:
            self._tell(entry.seq, _event("entry", msgspec.json.encode(entry), entry.seq))

    def found(self, seq: int, **changes: float) -> None:
        """Something was found out about the entry ``seq``."""
        if self._inboxes:
            self._tell(0, _event("found", msgspec.json.encode({"seq": seq, **changes})))

    async def watch(self, nodes: Callable[[], bytes], totals: Callable[[], bytes]) -> None:
        """Tell what ``nodes`` says, JSON, every second until cancelled, and ``totals`` if that has changed."""
        told = b""
        while True:
            await asyncio.sleep(EVERY_S)
            if self._inboxes:
                self._tell(0, _event("nodes", nodes()))
                if told != (now := totals()):
                    told = now
                    self._tell(0, _event("totals", now))

    def require_room(self) -> None:
        """Raise :class:`CapacityError` if there are too many clients."""
        if len(self._inboxes) >= MAX_CLIENTS:
            raise CapacityError(f"{MAX_CLIENTS} clients read /events already; try again later")

    @contextmanager
    def inbox(self) -> Iterator[Inbox]:
        """What happens during the body."""
        inbox = Inbox()
        if self._closed:
            inbox.close()
        self._inboxes.add(inbox)
        try:
            yield inbox
        finally:
            self._inboxes.discard(inbox)

    def close(self) -> None:
        """End every client's stream: an open one would hold up the proxy's end."""
        self._closed = True
        for inbox in self._inboxes:
            inbox.close()

    def _tell(self, seq: int, event: bytes) -> None:
        for inbox in self._inboxes:
            inbox.put(seq, event)


class EventStream(Response):
    """One client's stream. It begins with ``nodes``, ``totals`` and, if ``since`` is not None, the entries after it."""

    def __init__(self, events: Events, ledger: Ledger, nodes: bytes, totals: bytes, since: int | None) -> None:
        super().__init__(headers=_HEADERS, media_type="text/event-stream")
        del self.headers["Content-Length"]
        self._events = events
        self._ledger = ledger
        self._first = (_event("nodes", nodes), _event("totals", totals))
        self._since = since

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Tell until the client is gone, too slow, or the proxy ends."""
        await until_gone(self._serve(send), receive)

    async def _serve(self, send: Send) -> None:
        with self._events.inbox() as inbox, suppress(TimeoutError, OSError):
            await _timely(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            for event in self._first:
                await self._say(send, event)
            replayed = await self._replay(send)
            while taken := await inbox.take():
                for seq, event in taken:
                    if not 0 < seq <= replayed:
                        await self._say(send, event)
            await _timely(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _replay(self, send: Send) -> int:
        """Tell what was missed; returns the number of the last entry that was told so."""
        if self._since is None:
            return 0
        pages = self._ledger.pages(Wanted(since=self._since), MAX_REPLAYED)
        last = 0
        while page := await asyncio.to_thread(next, pages, None):
            for entry in page:
                last = msgspec.json.decode(entry, type=_Numbered).seq
                await self._say(send, _event("entry", entry.encode(), last))
        return last

    async def _say(self, send: Send, event: bytes) -> None:
        await _timely(send, {"type": "http.response.body", "body": event, "more_body": True})


class _Numbered(msgspec.Struct):
    seq: int


def _event(name: str, data: bytes, seq: int | None = None) -> bytes:
    number = b"" if seq is None else f"id: {seq}\n".encode()
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n" + number + b"\n"


async def _timely(send: Send, message: Message) -> None:
    async with asyncio.timeout(STALLED_S):
        await send(message)
