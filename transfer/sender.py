"""The prefill node's end of the KV plane: one thread that encodes queued slabs and owns the sockets.

The engine's thread hands slabs over and goes on; it never waits for a codec or a socket. What may be held is bounded: a
transfer that would push the backlog over ``max_backlog_bytes`` fails alone. Each decode worker gets one link
(``link.py``); each transfer (``outgoing.py``) sends only as many chunks as the worker has granted credits for, and
keeps what it sent until the worker says that it has landed.
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
from transfer.keys import ClientKeys
from transfer.layout import Elements
from transfer.link import Link
from transfer.messages import Cancel, Credit, Landed, Resend, Ticket
from transfer.outgoing import Outgoing, Part
from transfer.shares import Share

log = structlog.get_logger()

MAX_LINKS = 64
IDLE_LINK_S = 60.0
POLL_MS = 100
CLOSE_LINGER_MS = 1000
FRAMES_PER_TURN = 4


class KVSender:
    """Queues transfers and sends them; every method is thread-safe and returns at once.

    With ``share`` others send the rest of the model's KV.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        *,
        max_backlog_bytes: int,
        frame_bytes: int,
        share: Share | None = None,
        keys: ClientKeys | None = None,
    ) -> None:
        self._geometry = geometry
        self._share = share
        self._first_layer = share.first_layer if share else 0
        self._keys = keys
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
        """KV bytes handed over that have not landed yet."""
        return self._backlog_bytes

    def open(self, ticket: Ticket) -> None:
        """Begin a transfer.

        Raises :class:`ProtocolError` for a ticket that is not one, :class:`CodecError` for an unknown codec and
        :class:`LinkError` for a ticket in use.
        """
        sent = self._share.geometry(self._geometry) if self._share else self._geometry
        transfer = Outgoing(ticket, sent, self._release)
        with self._lock:
            if ticket.ticket in self._open:
                raise LinkError(f"ticket {ticket.ticket} is already in use")
            self._open.add(ticket.ticket)
        self._post(lambda: self._start(transfer))

    def submit(
        self,
        ticket: str,
        tokens: range,
        first_layer: int,
        elements: Elements,
        element: Element,
        gather_ns: int,
        *,
        d2h_ns: int = 0,
        encoded: bool = False,
    ) -> bool:
        """Queue the layers of ``tokens`` from ``first_layer`` on: uint16 ``[layers, elements of one layer]``.

        Layers count from the share's first. If ``encoded``, ``elements`` are the layers' payload already, cut into as
        many equal rows; it becomes one frame.

        The array belongs to the sender from here on. ``tokens`` is a chunk, at most as long as the ticket allows; the
        layers of a chunk come in order, those of several chunks may take turns, the earlier chunk first. False if the
        transfer has failed already, or fails now because the backlog is full.
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
        part = Part(tokens, self._first_layer + first_layer, elements, element, encoded)
        self._post(lambda: self._queue(ticket, part, gather_ns, d2h_ns))
        return True

    def finish(self, ticket: str, end_token: int) -> None:
        """Send END after what is queued: ``end_token`` is the position after the transfer's last token."""
        self._post(lambda: self._finish(ticket, end_token))

    def abort(self, ticket: str, reason: str) -> None:
        """Drop what is queued for ``ticket`` and tell the worker why."""
        self._post(lambda: self._fail_by_id(ticket, reason))

    def take_failed(self) -> dict[str, str]:
        """Tickets that failed since the last call, with their reasons."""
        with self._lock:
            failed, self._failed = self._failed, {}
        return failed

    def close(self, timeout_s: float = 2.0) -> None:
        """Stop the thread and close the sockets; what ZeroMQ holds gets a second to leave.

        Workers hear of prompts that were computed here and have not landed: nobody else would tell them. Of the others
        whoever asked for them hears, and may have the worker compute the rest.
        """
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
        for transfer in [t for t in self._transfers.values() if t.end_token is not None]:
            self._fail(transfer, "the prefill node ended")
        for link in self._links.values():
            link.close(CLOSE_LINGER_MS)

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
        self._tend(time.monotonic_ns())
        # Few frames a turn keep the inbox answered.
        for _ in range(FRAMES_PER_TURN):
            if not self._advance_first():
                break
        self._watch()
        return True

    def _advance_first(self) -> bool:
        """Send one frame of the transfer whose time runs out first, of those that can; whether one was sent."""
        return any(
            self._advance(transfer) for transfer in sorted(self._transfers.values(), key=lambda t: t.deadline_ns)
        )

    def _watch(self) -> None:
        """Wake up for writable sockets only where something waits to be written."""
        waiting = {t.ticket.kv_endpoint for t in self._transfers.values() if t.has_frame}
        for endpoint, link in self._links.items():
            wanted = link.has_farewell or (link.open and endpoint in waiting)
            self._poller.modify(link.frames, zmq.POLLOUT if wanted else 0)

    def _start(self, transfer: Outgoing) -> None:
        endpoint = transfer.ticket.kv_endpoint
        try:
            link = self._links.get(endpoint) or self._connect(endpoint)
        except LinkError as error:
            self._fail(transfer, str(error))
            return
        self._transfers[transfer.ticket.ticket] = transfer
        # Said for each transfer: the worker may have been restarted.
        link.hello()

    def _connect(self, endpoint: str) -> Link:
        if len(self._links) >= MAX_LINKS:
            raise LinkError(f"already connected to {MAX_LINKS} decode workers")
        link = self._links[endpoint] = Link(self._context, endpoint, self._geometry, self._share, self._keys)
        self._poller.register(link.control, zmq.POLLIN)
        return link

    def _queue(self, ticket: str, part: Part, gather_ns: int, d2h_ns: int) -> None:
        if transfer := self._transfers.get(ticket):
            transfer.queue(part)
            transfer.gather_ns += gather_ns
            transfer.d2h_ns += d2h_ns
        else:
            self._release(part.elements.nbytes)

    def _finish(self, ticket: str, end_token: int) -> None:
        if transfer := self._transfers.get(ticket):
            transfer.end_token = end_token

    def _release(self, num_bytes: int) -> None:
        with self._lock:
            self._backlog_bytes -= num_bytes

    def _advance(self, transfer: Outgoing) -> bool:
        """Send at most one frame; whether one was sent."""
        link = self._links[transfer.ticket.kv_endpoint]
        if not link.open or not transfer.has_frame or not link.writable:
            return False
        try:
            frame = transfer.frame(min(self._frame_bytes, link.max_frame_bytes))
            sent_bytes = link.send(frame) if frame is not None else 0
        except (IsthmusError, zmq.ZMQError) as error:
            self._fail(transfer, str(error))
            return False
        except Exception as error:  # a fault in one transfer must not stop the others
            log.exception("frame could not be made", request_id=transfer.ticket.request_id)
            self._fail(transfer, f"internal error: {error}")
            return False
        if sent_bytes:
            transfer.sent(sent_bytes)
        return bool(sent_bytes)

    def _listen(self, link: Link) -> None:
        link.flush()
        try:
            for word in link.words():
                if transfer := self._transfers.get(word.ticket):
                    self._heed(transfer, word)
        except IsthmusError as error:
            self._lose(link, str(error))

    def _heed(self, transfer: Outgoing, word: Credit | Resend | Landed | Cancel) -> None:
        transfer.heard(time.monotonic_ns())
        match word:
            case Credit():
                transfer.credit_chunks = max(transfer.credit_chunks, word.chunks)
                transfer.acknowledge(word.next_sequence)
            case Resend():
                try:
                    transfer.rewind(word.sequence)
                except LinkError as error:
                    self._fail(transfer, str(error))
            case Landed():
                self._forget(transfer)
            case Cancel():
                self._fail(transfer, f"cancelled by the decode worker: {word.reason}", tell=False)

    def _lose(self, link: Link, reason: str) -> None:
        """Give the link up, and every transfer on it."""
        log.error("link lost", endpoint=link.endpoint, reason=reason)
        for transfer in [t for t in self._transfers.values() if t.ticket.kv_endpoint == link.endpoint]:
            self._fail(transfer, f"{link.endpoint}: {reason}", tell=False)
        self._drop_link(link)

    def _tend(self, now_ns: int) -> None:
        """Ask silent workers where they stand; give up what is too late, and links that nobody uses."""
        for transfer in list(self._transfers.values()):
            link = self._links[transfer.ticket.kv_endpoint]
            if transfer.deadline_ns < now_ns:
                heard = "" if link.open else ": the decode worker did not answer"
                self._fail(transfer, f"transfer did not finish within {transfer.ticket.deadline_ms} ms{heard}")
            elif transfer.wants_probe(now_ns):
                if link.open:
                    link.send(transfer.probe_frame())
                # A worker that has lost this sender's session does not hear the probe, but it hears a hello.
                link.hello()
        busy = {transfer.ticket.kv_endpoint for transfer in self._transfers.values()}
        for endpoint, link in list(self._links.items()):
            if endpoint not in busy and now_ns - link.used_ns > IDLE_LINK_S * 1e9:
                self._drop_link(link)

    def _drop_link(self, link: Link) -> None:
        for socket in (link.control, link.frames):
            if socket in self._poller:
                self._poller.unregister(socket)
        link.close()
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
