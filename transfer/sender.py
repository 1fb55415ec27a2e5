"""The prefill node's end of the KV plane: one thread that encodes queued chunks and owns the sockets.

The engine's thread hands chunks over and goes on; it never waits for a codec or a socket. What may be queued is
bounded: a transfer that would push the backlog over ``max_backlog_bytes`` fails alone. Each decode worker gets one
DEALER socket and a handshake; each transfer sends only as many chunks as the worker has granted credits for.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import msgspec
import structlog
import zmq

from transfer import codecs, frames
from transfer.errors import IsthmusError, LinkError, ProtocolError
from transfer.frames import Element, Header, Kind
from transfer.geometry import KVGeometry
from transfer.layout import Elements, layers_per_frame
from transfer.messages import (
    TICKET_BYTES,
    Cancel,
    Credit,
    Failure,
    SenderHello,
    SenderWelcome,
    Ticket,
    decode_from_receiver,
    encode,
    require_protocol,
)
from transfer.stages import SenderReport

log = structlog.get_logger()

MAX_LINKS = 64
IDLE_LINK_S = 60.0
POLL_MS = 200
# A worker takes frames as fast as it can land them; more in ZeroMQ's queue would only hold memory.
SEND_HIGH_WATER_MARK_FRAMES = 4
CLOSE_LINGER_MS = 1000


class Chunk(msgspec.Struct):
    """A token range of all layers that waits to be sent: uint16 ``[num_layers, elements of one layer]``."""

    start_token: int
    num_tokens: int
    elements: Elements
    element: Element


class Transfer:
    """One ticket's way over the wire. Only the sender thread touches it."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.key = _key(ticket.ticket)
        self.codec = codecs.by_name(ticket.codec)
        self.pending: deque[Chunk] = deque()
        self.frames: Iterator[tuple[bytes, codecs.Payload]] | None = None
        self.blocked: tuple[bytes, codecs.Payload] | None = None
        self.credit_chunks = ticket.credit_chunks
        self.started_chunks = 0
        self.sequence = 0
        self.total_tokens: int | None = None
        self.closing = False
        self.deadline_ns = time.monotonic_ns() + ticket.deadline_ms * 1_000_000
        self.raw_bytes = self.wire_bytes = self.gather_ns = self.encode_ns = 0


def _key(ticket: str) -> bytes:
    try:
        key = bytes.fromhex(ticket)
    except ValueError:
        key = b""
    if len(key) != TICKET_BYTES:
        raise ProtocolError(f"ticket must be {2 * TICKET_BYTES} hex digits, not {ticket[:64]!r}")
    return key


class Link:
    """The socket to one decode worker and how far its handshake has come."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self.unanswered_hellos = 0
        self.max_frame_bytes = 0
        self.used_ns = time.monotonic_ns()

    @property
    def welcome(self) -> bool:
        """Whether the worker, as it is now, has accepted this sender."""
        return self.unanswered_hellos == 0


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
        self._transfers: dict[str, Transfer] = {}
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
        transfer = Transfer(ticket)
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
        for endpoint, link in list(self._links.items()):
            self._listen(endpoint, link)
        self._expire()
        # The transfer whose time runs out first goes first; one frame a turn keeps the inbox answered.
        for transfer in sorted(self._transfers.values(), key=lambda transfer: transfer.deadline_ns):
            if self._advance(transfer):
                break
        self._watch()
        return True

    def _watch(self) -> None:
        """Wake up for writable sockets only where something waits to be written."""
        wanted = {t.ticket.kv_endpoint for t in self._transfers.values() if self._has_frame(t)}
        for endpoint, link in self._links.items():
            self._poller.modify(link.socket, zmq.POLLIN | (zmq.POLLOUT if endpoint in wanted else 0))

    def _has_frame(self, transfer: Transfer) -> bool:
        if not self._links[transfer.ticket.kv_endpoint].welcome:
            return False
        if transfer.blocked is not None or transfer.frames is not None:
            return True
        if transfer.pending:
            return transfer.started_chunks < transfer.credit_chunks
        return transfer.total_tokens is not None

    def _start(self, transfer: Transfer) -> None:
        endpoint = transfer.ticket.kv_endpoint
        if endpoint not in self._links:
            try:
                self._links[endpoint] = self._connect(endpoint)
            except (LinkError, zmq.ZMQError) as error:
                self._fail(transfer, f"cannot connect to {endpoint}: {error}")
                return
        self._transfers[transfer.ticket.ticket] = transfer
        # Said again for every transfer: the worker may have been restarted since the last one.
        self._say_hello(self._links[endpoint])

    def _connect(self, endpoint: str) -> Link:
        if len(self._links) >= MAX_LINKS:
            raise LinkError(f"already connected to {MAX_LINKS} decode workers")
        socket = self._context.socket(zmq.DEALER)
        socket.sndhwm = SEND_HIGH_WATER_MARK_FRAMES
        socket.rcvhwm = 1000
        socket.linger = 0
        try:
            socket.connect(endpoint)
        except zmq.ZMQError:
            socket.close()
            raise
        self._poller.register(socket, zmq.POLLIN)
        return Link(socket)

    def _say_hello(self, link: Link) -> None:
        link.used_ns = time.monotonic_ns()
        hello = SenderHello(geometry=self._geometry, codecs=tuple(codecs.CODECS))
        try:
            link.socket.send(encode(hello), zmq.NOBLOCK)
        except zmq.Again:
            # Hellos or frames that wait already will be answered, or the transfer's deadline will tell.
            log.info("hello could not be queued")
        else:
            link.unanswered_hellos += 1

    def _queue(self, ticket: str, chunk: Chunk, gather_ns: int) -> None:
        transfer = self._transfers.get(ticket)
        if transfer is None:
            self._release(chunk)
            return
        transfer.pending.append(chunk)
        transfer.gather_ns += gather_ns

    def _finish(self, ticket: str, num_tokens: int) -> None:
        if transfer := self._transfers.get(ticket):
            transfer.total_tokens = num_tokens

    def _release(self, chunk: Chunk) -> None:
        with self._lock:
            self._backlog_bytes -= chunk.elements.nbytes

    def _advance(self, transfer: Transfer) -> bool:
        """Send at most one frame; whether one was sent."""
        link = self._links[transfer.ticket.kv_endpoint]
        if not self._has_frame(transfer) or not link.socket.poll(0, zmq.POLLOUT):
            return False
        try:
            frame = transfer.blocked or self._next_frame(transfer)
            if frame is None:
                return False
            transfer.blocked = frame
            link.socket.send_multipart(frame, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        except (IsthmusError, zmq.ZMQError) as error:
            self._fail(transfer, str(error))
            return False
        except Exception as error:  # a fault in one transfer must not stop the others
            log.exception("frame could not be made", request_id=transfer.ticket.request_id)
            self._fail(transfer, f"internal error: {error}")
            return False
        link.used_ns = time.monotonic_ns()
        transfer.blocked = None
        transfer.wire_bytes += sum(map(len, frame))
        if transfer.closing:
            self._forget(transfer)
        return True

    def _next_frame(self, transfer: Transfer) -> tuple[bytes, codecs.Payload] | None:
        while transfer.frames is not None or transfer.pending:
            if transfer.frames is None:
                if transfer.started_chunks == transfer.credit_chunks:
                    return None
                transfer.started_chunks += 1
                transfer.frames = self._frames_of(transfer, transfer.pending[0])
            if frame := next(transfer.frames, None):
                return frame
            transfer.frames = None
            self._release(transfer.pending.popleft())
        return None if transfer.total_tokens is None else self._end_frame(transfer, transfer.total_tokens)

    def _frames_of(self, transfer: Transfer, chunk: Chunk) -> Iterator[tuple[bytes, codecs.Payload]]:
        """Encode the chunk's layer groups one by one, just before each leaves."""
        frame_bytes = min(self._frame_bytes, self._links[transfer.ticket.kv_endpoint].max_frame_bytes)
        group = layers_per_frame(self._geometry, chunk.num_tokens, frame_bytes)
        for first in range(0, self._geometry.num_layers, group):
            elements = chunk.elements[first : first + group]
            began = time.monotonic_ns()
            payload = transfer.codec.encode(elements.reshape(-1), chunk.element)
            transfer.encode_ns += time.monotonic_ns() - began
            transfer.raw_bytes += elements.nbytes
            header = Header(
                kind=Kind.DATA,
                ticket=transfer.key,
                sequence=transfer.sequence,
                codec=transfer.codec.wire_id,
                element=chunk.element,
                start_token=chunk.start_token,
                num_tokens=chunk.num_tokens,
                first_layer=first,
                num_layers=len(elements),
            )
            transfer.sequence += 1
            yield frames.pack(header, payload), payload

    def _end_frame(self, transfer: Transfer, total_tokens: int) -> tuple[bytes, codecs.Payload]:
        report = SenderReport(
            num_tokens=total_tokens,
            num_frames=transfer.sequence,
            kv_raw_bytes=transfer.raw_bytes,
            kv_wire_bytes=transfer.wire_bytes,
            gather_ns=transfer.gather_ns,
            encode_ns=transfer.encode_ns,
        )
        transfer.closing = True
        return self._closing_frame(transfer, Kind.END, msgspec.msgpack.encode(report))

    def _closing_frame(self, transfer: Transfer, kind: Kind, payload: bytes) -> tuple[bytes, codecs.Payload]:
        header = Header(
            kind=kind,
            ticket=transfer.key,
            sequence=transfer.sequence,
            num_tokens=transfer.total_tokens or 0,
        )
        return frames.pack(header, payload), payload

    def _listen(self, endpoint: str, link: Link) -> None:
        while link.socket.poll(0, zmq.POLLIN):
            try:
                message = decode_from_receiver(link.socket.recv(zmq.NOBLOCK))
                match message:
                    case SenderWelcome():
                        require_protocol(message.protocol)
                        link.max_frame_bytes = message.max_frame_bytes
                        link.unanswered_hellos = max(0, link.unanswered_hellos - 1)
                    case Credit():
                        if transfer := self._transfers.get(message.ticket):
                            transfer.credit_chunks = max(transfer.credit_chunks, message.chunks)
                    case Cancel():
                        if transfer := self._transfers.get(message.ticket):
                            self._fail(transfer, f"cancelled by the decode worker: {message.reason}", tell=False)
                    case Failure():
                        self._lose(endpoint, link, f"refused this sender: {message.message}")
                        return
            except IsthmusError as error:
                self._lose(endpoint, link, str(error))
                return

    def _lose(self, endpoint: str, link: Link, reason: str) -> None:
        """Give the link up, and every transfer on it."""
        log.error("link lost", endpoint=endpoint, reason=reason)
        for transfer in [t for t in self._transfers.values() if t.ticket.kv_endpoint == endpoint]:
            self._fail(transfer, f"{endpoint}: {reason}", tell=False)
        self._drop_link(endpoint, link)

    def _expire(self) -> None:
        now = time.monotonic_ns()
        for transfer in [t for t in self._transfers.values() if t.deadline_ns < now]:
            endpoint = transfer.ticket.kv_endpoint
            link = self._links.get(endpoint)
            if link is None:
                continue
            if link.welcome:
                self._fail(transfer, f"transfer did not finish within {transfer.ticket.deadline_ms} ms")
            else:
                self._lose(endpoint, link, "the handshake was not answered in time")
        busy = {transfer.ticket.kv_endpoint for transfer in self._transfers.values()}
        for endpoint, link in list(self._links.items()):
            if endpoint not in busy and now - link.used_ns > IDLE_LINK_S * 1e9:
                self._drop_link(endpoint, link)

    def _drop_link(self, endpoint: str, link: Link) -> None:
        self._poller.unregister(link.socket)
        link.socket.close()
        del self._links[endpoint]

    def _fail_by_id(self, ticket: str, reason: str) -> None:
        if transfer := self._transfers.get(ticket):
            self._fail(transfer, reason)

    def _fail(self, transfer: Transfer, reason: str, *, tell: bool = True) -> None:
        log.warning("transfer failed", request_id=transfer.ticket.request_id, reason=reason)
        link = self._links.get(transfer.ticket.kv_endpoint)
        if tell and link is not None and link.welcome:
            frame = self._closing_frame(transfer, Kind.ABORT, reason.encode()[: frames.MAX_CONTROL_PAYLOAD_BYTES])
            try:
                link.socket.send_multipart(frame, zmq.NOBLOCK)
            except zmq.ZMQError:
                log.info("could not tell the worker", request_id=transfer.ticket.request_id)
        self._forget(transfer, reason)

    def _forget(self, transfer: Transfer, reason: str | None = None) -> None:
        """Drop a transfer and what it holds; ``reason`` marks it failed."""
        for chunk in transfer.pending:
            self._release(chunk)
        self._transfers.pop(transfer.ticket.ticket, None)
        with self._lock:
            self._open.discard(transfer.ticket.ticket)
            if reason is not None:
                self._failed[transfer.ticket.ticket] = reason
