"""The decode worker's end of the KV plane: checks every frame before anyone sees it.

A plain object around a ROUTER socket, driven by the worker's I/O thread. Frames that pass (format, limits, checksums,
sequence, a ticket that is open and belongs to this sender) go to the ticket's :class:`Sink`; anything else ends that
transfer and is said to the sender. A bad frame never reaches memory that the engine reads.
"""

from __future__ import annotations

from typing import Protocol

import msgspec
import structlog
import zmq

from transfer import frames
from transfer.codecs import CODECS
from transfer.errors import CodecError, IsthmusError, LinkError, ProtocolError
from transfer.frames import HEADER_BYTES, Header, Kind
from transfer.geometry import KVGeometry, require_same
from transfer.messages import (
    Cancel,
    Credit,
    Failure,
    SenderHello,
    SenderWelcome,
    decode_to_receiver,
    encode,
    require_protocol,
)
from transfer.stages import SenderReport

log = structlog.get_logger()

MAX_SENDERS = 256
RECEIVE_HIGH_WATER_MARK_FRAMES = 8
# One turn of the I/O thread takes at most this many frames, so that control messages are answered meanwhile.
FRAMES_PER_TURN = 4


class Sink(Protocol):
    """Where one ticket's frames go. ``data`` may raise :class:`IsthmusError`, which ends the transfer."""

    def data(self, header: Header, payload: memoryview) -> None:
        """Take one DATA frame, in sequence; ``payload`` is only valid during the call."""

    def end(self, report: SenderReport) -> None:
        """All frames have come; raises :class:`ProtocolError` if they do not cover the prompt."""

    def fail(self, error: IsthmusError) -> None:
        """The transfer is over; nothing more will come."""


class Incoming:
    """One open ticket: its sink, and the sender that first used it."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.sender: bytes | None = None
        self.sequence = 0


class KVReceiver:
    """Owns the KV socket, bound to ``endpoint``; all methods belong to one thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, geometry: KVGeometry, frame_bytes: int):
        # Scales, lengths and incompressible planes may make a payload a little larger than its elements.
        self._max_payload_bytes = frame_bytes + frame_bytes // 16 + 1024
        self._geometry = geometry
        self._frame_bytes = frame_bytes
        self._senders: set[bytes] = set()
        self._incoming: dict[bytes, Incoming] = {}
        self.socket = context.socket(zmq.ROUTER)
        self.socket.rcvhwm = RECEIVE_HIGH_WATER_MARK_FRAMES
        self.socket.sndhwm = 1000
        self.socket.maxmsgsize = self._max_payload_bytes
        self.socket.linger = 0
        self.socket.router_mandatory = True
        self.socket.bind(endpoint)

    @property
    def port(self) -> int:
        """The TCP port that the socket is bound to."""
        return int(self.socket.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])

    @property
    def open_tickets(self) -> int:
        """Tickets that still expect frames."""
        return len(self._incoming)

    def expect(self, ticket: str, sink: Sink) -> None:
        """Let frames for ``ticket`` (32 hex digits) in, to ``sink``."""
        self._incoming[bytes.fromhex(ticket)] = Incoming(sink)

    def grant(self, ticket: str, chunks: int) -> None:
        """Tell the sender that it may have sent ``chunks`` chunks in total on ``ticket``."""
        incoming = self._incoming.get(bytes.fromhex(ticket))
        if incoming is not None and incoming.sender is not None:
            self._send(incoming.sender, Credit(ticket=ticket, chunks=chunks))

    def cancel(self, ticket: str, reason: str) -> None:
        """Stop expecting ``ticket``; its sink hears nothing more."""
        incoming = self._incoming.pop(bytes.fromhex(ticket), None)
        if incoming is not None and incoming.sender is not None:
            self._send(incoming.sender, Cancel(ticket=ticket, reason=reason))

    def turn(self) -> None:
        """Handle the messages that have arrived, at most a few."""
        for _ in range(FRAMES_PER_TURN):
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            sender, *rest = [part.buffer for part in parts]
            match rest:
                case [message]:
                    self._message(bytes(sender), message)
                case [head, payload]:
                    self._frame(bytes(sender), head, payload)
                case _:
                    log.warning("dropped a message of odd shape on the KV plane", parts=len(parts))

    def close(self) -> None:
        """Close the socket; sinks hear nothing more."""
        self._incoming.clear()
        self.socket.close()

    def _message(self, sender: bytes, data: memoryview) -> None:
        try:
            hello = decode_to_receiver(data)
            self._admit(sender, hello)
        except IsthmusError as error:
            log.warning("refused a sender", reason=str(error))
            self._send(sender, Failure(code=error.code, message=str(error)))
            return
        self._send(sender, SenderWelcome(max_frame_bytes=self._frame_bytes))

    def _admit(self, sender: bytes, hello: SenderHello) -> None:
        require_protocol(hello.protocol)
        require_same(self._geometry, hello.geometry)
        if not set(hello.codecs) & set(CODECS):
            raise CodecError(f"no codec in common: {', '.join(CODECS)} here, {', '.join(hello.codecs)} there")
        if len(self._senders) >= MAX_SENDERS:
            # Identities of senders that left are not reported by ROUTER; those in use say hello with every transfer.
            self._senders.clear()
        self._senders.add(sender)

    def _frame(self, sender: bytes, head: memoryview, payload: memoryview) -> None:
        ticket = bytes(head[12:28])
        if sender not in self._senders:
            self._send(sender, Failure(code=ProtocolError.code, message="say hello before sending frames"))
            return
        incoming = self._incoming.get(ticket)
        if incoming is None:
            if len(head) == HEADER_BYTES and head[6] == Kind.DATA:
                self._send(sender, Cancel(ticket=ticket.hex(), reason="ticket is not open"))
            return
        if incoming.sender is None:
            incoming.sender = sender
        if sender != incoming.sender:
            log.warning("ignored a frame from a second sender", ticket=ticket.hex())
            return
        try:
            self._accept(incoming, frames.parse(head, payload, self._max_payload_bytes), payload)
        except IsthmusError as error:
            self.cancel(ticket.hex(), str(error))
            incoming.sink.fail(error)

    def _accept(self, incoming: Incoming, header: Header, payload: memoryview) -> None:
        if header.kind == Kind.ABORT:
            raise LinkError(f"prefill node aborted the transfer: {bytes(payload).decode(errors='replace')}")
        if header.sequence < incoming.sequence:
            log.info("ignored a duplicate frame", ticket=header.ticket.hex(), sequence=header.sequence)
            return
        if header.sequence > incoming.sequence:
            raise ProtocolError(f"frame {header.sequence} came where {incoming.sequence} was due")
        incoming.sequence += 1
        if header.kind == Kind.DATA:
            incoming.sink.data(header, payload)
            return
        try:
            report = msgspec.msgpack.decode(payload, type=SenderReport)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"END frame does not parse: {error}") from None
        incoming.sink.end(report)
        self._incoming.pop(header.ticket, None)

    def _send(self, sender: bytes, message: Credit | Cancel | Failure | SenderWelcome) -> None:
        try:
            self.socket.send_multipart([sender, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.info("could not answer a sender", reason=str(error))
