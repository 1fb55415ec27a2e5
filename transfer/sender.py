"""The prefill node's end of the KV plane: one thread that encodes queued chunks and owns the sockets.

The engine's thread hands chunks over and goes on; it never waits for a codec or a socket. What may be queued is
bounded: a transfer that would push the backlog over ``max_backlog_bytes`` fails alone. Each decode worker gets one
link (``link.py``); each transfer (``outgoing.py``) sends only as many chunks as the worker has granted credits for.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable

import structlog
import zmq

from transfer.errors import IsthmusError, LinkError
from transfer.frames import Element
from transfer.geometry import KVGeometry
from transfer.layout import Elements
from transfer.link import Link
from transfer.messages import Cancel, Credit, Ticket
from transfer.outgoing import Chunk, Outgoing

log = structlog.get_logger()

MAX_LINKS = 64
IDLE_LINK_S = 60.0
POLL_MS = 200
CLOSE_LINGER_MS = 1000


class KVSender:
    """Queues transfers and sends them; every method is thread-safe and returns at once."""

    def __init__(self, geometry: KVGeometry, *, max_backlog_bytes: int, frame_bytes: int) -> None:
        self._geometry = geometry
        self._max_backlog_bytes = max_backlog_bytes
        self._frame_bytes = frame_bytes
        self._lock = threading.Lock()
        self._open: set[str] = set()
        self._failed: dict[str, str] = {}
        self._backlog_bytes = 0
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._transfers: dict[str, Outgoing] = {}
        self._links: dict[str, Link] = {}
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._poller.register(self._wake, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name="isthmus-sender", daemon=True)
        self._thread.start()

    # What the engine's thread calls.

    @property
    def backlog_bytes(self) -> int:
        """KV bytes handed over and not yet encoded and given to the socket."""
        return self._backlog_bytes

    def open(self, ticket: Ticket) -> None:
        """Begin a transfer.

        Raises :class:`ProtocolError` for a ticket that is not one, :class:`CodecError` for an unknown codec and
        :class:`LinkError` for a ticket in use.
        """
        transfer = Outgoing(ticket, self._geometry, self._release)
        with self._lock:
            if ticket.ticket in self._open:
                raise LinkError(f"ticket {ticket.ticket} is already in use")
            self._open.add(ticket.ticket)
        self._post(lambda: self._start(transfer))

    def submit(self, ticket: str, start_token: int, elements: Elements, element: Element, gather_ns: int) -> bool:
        """Queue one chunk, uint16 ``[num_layers, elements of one layer]``; it belongs to the sender from here on.

        False if the transfer has failed already, or fails now because the backlog is full.
        """
        with self._lock:
            if ticket not in self._open:
                return False
            full = self._backlog_bytes + elements.nbytes > self._max_backlog_bytes
            if not full:
                self._backlog_bytes += elements.nbytes
        if full:
            self.abort(ticket, f"sender backlog is over {self._max_backlog_bytes} bytes")
            return False
        per_token = elements.size // self._geometry.elements_per_token
        chunk = Chunk(start_token, per_token, elements, element)
        self._post(lambda: self._queue(ticket, chunk, gather_ns))
        return True

    def finish(self, ticket: str, num_tokens: int) -> None:
        """Send END after what is queued: the transfer holds ``num_tokens`` tokens."""
        self._post(lambda: self._finish(ticket, num_tokens))

    def abort(self, ticket: str, reason: str) -> None:
        """Drop what is queued for ``ticket`` and tell the worker why."""
        self._post(lambda: self._fail_by_id(ticket, reason))

    def take_failed(self) -> dict[str, str]:
        """Tickets that failed since the last call, with their reasons."""
        with self._lock:
            failed, self._failed = self._failed, {}
        return failed

    def close(self, timeout_s: float = 2.0) -> None:
        """Stop the thread and close the sockets; what ZeroMQ holds gets a second to leave."""
        self._inbox.put(None)
        os.eventfd_write(self._wake, 1)
        self._thread.join(timeout_s)
        self._context.term()
        os.close(self._wake)

    def _post(self, action: Callable[[], None]) -> None:
        self._inbox.put(action)
        os.eventfd_write(self._wake, 1)

    # What the sender thread does.

    def _run(self) -> None:
        running = True
        while running:
            try:
                running = self._turn()
            except Exception as error:  # the thread must outlive any one transfer
                log.exception("sender turn failed, its transfers with it")
                for transfer in list(self._transfers.values()):
                    self._forget(transfer, reason=f"sender failed: {error}")
        for link in self._links.values():
            link.socket.close(linger=CLOSE_LINGER_MS)

    def _turn(self) -> bool:
        ready = dict(self._poller.poll(POLL_MS))
        if self._wake in ready:
            os.eventfd_read(self._wake)
        while not self._inbox.empty():
            action = self._inbox.get()
            if action is None:
                return False
            action()
        for link in list(self._links.values()):
            self._listen(link)
        self._expire()
        # The transfer whose time runs out first goes first; one frame a turn keeps the inbox answered.
        for transfer in sorted(self._transfers.values(), key=lambda transfer: transfer.deadline_ns):
            if self._advance(transfer):
                break
        self._watch()
        return True

    def _watch(self) -> None:
        """Wake up for writable sockets only where something waits to be written."""
        waiting = {t.ticket.kv_endpoint for t in self._transfers.values() if t.has_frame}
        for endpoint, link in self._links.items():
            wanted = link.has_farewell or (link.welcome and endpoint in waiting)
            self._poller.modify(link.socket, zmq.POLLIN | (zmq.POLLOUT if wanted else 0))

    def _start(self, transfer: Outgoing) -> None:
        endpoint = transfer.ticket.kv_endpoint
        try:
            link = self._links.get(endpoint) or self._connect(endpoint)
        except LinkError as error:
            self._fail(transfer, str(error))
            return
        self._transfers[transfer.ticket.ticket] = transfer
        link.hello()

    def _connect(self, endpoint: str) -> Link:
        if len(self._links) >= MAX_LINKS:
            raise LinkError(f"already connected to {MAX_LINKS} decode workers")
        link = self._links[endpoint] = Link(self._context, endpoint, self._geometry)
        self._poller.register(link.socket, zmq.POLLIN)
        return link

    def _queue(self, ticket: str, chunk: Chunk, gather_ns: int) -> None:
        if transfer := self._transfers.get(ticket):
            transfer.queue(chunk)
            transfer.gather_ns += gather_ns
        else:
            self._release(chunk.elements.nbytes)

    def _finish(self, ticket: str, num_tokens: int) -> None:
        if transfer := self._transfers.get(ticket):
            transfer.total_tokens = num_tokens

    def _release(self, num_bytes: int) -> None:
        with self._lock:
            self._backlog_bytes -= num_bytes

    def _advance(self, transfer: Outgoing) -> bool:
        """Send at most one frame; whether one was sent."""
        link = self._links[transfer.ticket.kv_endpoint]
        if not link.welcome or not transfer.has_frame or not link.socket.poll(0, zmq.POLLOUT):
            return False
        try:
            frame = transfer.frame(min(self._frame_bytes, link.max_frame_bytes))
            if frame is None or not link.send(frame):
                return False
        except (IsthmusError, zmq.ZMQError) as error:
            self._fail(transfer, str(error))
            return False
        except Exception as error:  # a fault in one transfer must not stop the others
            log.exception("frame could not be made", request_id=transfer.ticket.request_id)
            self._fail(transfer, f"internal error: {error}")
            return False
        transfer.sent()
        if transfer.ended:
            self._forget(transfer)
        return True

    def _listen(self, link: Link) -> None:
        link.flush()
        try:
            for message in link.messages():
                transfer = self._transfers.get(message.ticket)
                if transfer is None:
                    continue
                match message:
                    case Credit():
                        transfer.credit_chunks = max(transfer.credit_chunks, message.chunks)
                    case Cancel():
                        self._fail(transfer, f"cancelled by the decode worker: {message.reason}", tell=False)
        except IsthmusError as error:
            self._lose(link, str(error))

    def _lose(self, link: Link, reason: str) -> None:
        """Give the link up, and every transfer on it."""
        log.error("link lost", endpoint=link.endpoint, reason=reason)
        for transfer in [t for t in self._transfers.values() if t.ticket.kv_endpoint == link.endpoint]:
            self._fail(transfer, f"{link.endpoint}: {reason}", tell=False)
        self._drop_link(link)

    def _expire(self) -> None:
        now = time.monotonic_ns()
        for transfer in [t for t in self._transfers.values() if t.deadline_ns < now]:
            link = self._links.get(transfer.ticket.kv_endpoint)
            if link is None:
                continue
            if link.welcome:
                self._fail(transfer, f"transfer did not finish within {transfer.ticket.deadline_ms} ms")
            else:
                self._lose(link, "the handshake was not answered in time")
        busy = {transfer.ticket.kv_endpoint for transfer in self._transfers.values()}
        for endpoint, link in list(self._links.items()):
            if endpoint not in busy and now - link.used_ns > IDLE_LINK_S * 1e9:
                self._drop_link(link)

    def _drop_link(self, link: Link) -> None:
        self._poller.unregister(link.socket)
        link.socket.close()
        del self._links[link.endpoint]

    def _fail_by_id(self, ticket: str, reason: str) -> None:
        if transfer := self._transfers.get(ticket):
            self._fail(transfer, reason)

    def _fail(self, transfer: Outgoing, reason: str, *, tell: bool = True) -> None:
        log.warning("transfer failed", request_id=transfer.ticket.request_id, reason=reason)
        link = self._links.get(transfer.ticket.kv_endpoint)
        if tell and link is not None:
            link.bid_farewell(transfer.abort_frame(reason))
        self._forget(transfer, reason)

    def _forget(self, transfer: Outgoing, reason: str | None = None) -> None:
        """Drop a transfer and what it holds; ``reason`` marks it failed."""
        transfer.drop()
        self._transfers.pop(transfer.ticket.ticket, None)
        with self._lock:
            self._open.discard(transfer.ticket.ticket)
            if reason is not None:
                self._failed[transfer.ticket.ticket] = reason
