"""The decode worker's end of the KV plane: checks every frame before anyone sees it.

A plain object around two sockets, driven by the worker's I/O thread: a ROUTER over which senders introduce themselves
and hear of credits and losses, and a PULL that frames come in by. A frame that is damaged or belongs to no session is
dropped; what is missing then is asked for again. A frame that is authentic and wrong ends its transfer. What passes
(format, limits, session, seal or checksum, sequence, a ticket that is open and belongs to this sender) goes to the
ticket's :class:`Sink`: a bad frame never reaches memory that the engine reads.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from contextlib import suppress

import msgspec
import structlog
import zmq

from transfer import frames, heap
from transfer.codecs import CODECS
from transfer.doorkeeper import FRAMES_DOMAIN
from transfer.errors import CodecError, ConfigError, IsthmusError, LinkError, ProtocolError
from transfer.frames import Header, Kind
from transfer.geometry import KVGeometry, require_same
from transfer.incoming import Incoming, Sink, Source
from transfer.keys import ServerKeys, secure_server
from transfer.listen import bind
from transfer.messages import (
    Cancel,
    Credit,
    Failure,
    FromReceiver,
    Landed,
    Resend,
    SenderHello,
    SenderWelcome,
    decode_to_receiver,
    encode,
    require_protocol,
)
from transfer.readiness import is_ready
from transfer.seal import KEY_BYTES, NAMES, Opener, SealName
from transfer.shares import Share, require_within, whole
from transfer.stages import SenderReport, joined

log = structlog.get_logger()

MAX_SESSIONS = 256
MAX_REMEMBERED_TICKETS = 1024
RECEIVE_HIGH_WATER_MARK_FRAMES = 8
MAX_CONTROL_BYTES = 64 << 10
# One turn of the I/O thread takes at most this many, so that the worker's other messages are answered meanwhile.
FRAMES_PER_TURN = 4
MESSAGES_PER_TURN = 64


class Session:
    """One sender's key, under a number that its frames carry."""

    def __init__(self, number: int, sender: bytes, share: Share | None, seal: SealName, max_payload_bytes: int) -> None:
        self.number = number
        self.sender = sender
        self.share = share
        self.seal = NAMES[seal]
        self.key = secrets.token_bytes(KEY_BYTES) if self.seal else b""
        self._opener = Opener(self.key, self.seal, max_payload_bytes) if self.seal else None

    def open(self, header: Header, parts: list[memoryview]) -> memoryview:
        """The payload of a frame, proven to be what the sender sent; raises :class:`ProtocolError`."""
        if header.seal is not self.seal or len(parts) != (3 if self._opener else 2):
            raise ProtocolError(
                f"frame has seal {header.seal.name} and {len(parts)} parts in a session of {self.seal.name}"
            )
        if self._opener is not None:
            return self._opener.open(header.check, *parts)
        if frames.checksum(parts[1]) != header.check:
            raise ProtocolError("frame payload does not match its checksum")
        return parts[1]


class KVReceiver:
    """Owns both sockets, bound to ``host``; port 0 is one of the system's choice. All methods belong to one thread.

    With ``keys`` the control socket speaks CURVE; its context needs a :class:`~transfer.doorkeeper.Doorkeeper`. Raises
    :class:`ConfigError` for a seal without keys.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        host: str,
        geometry: KVGeometry,
        *,
        frame_bytes: int,
        control_port: int = 0,
        frames_port: int = 0,
        seal: SealName = "none",
        keys: ServerKeys | None = None,
    ) -> None:
        if keys is None and seal != "none":
            raise ConfigError(f"seal {seal!r} needs keys: the session key must not travel in the clear")
        # Scales, lengths and incompressible planes may make a payload a little larger than its elements.
        self._max_payload_bytes = frame_bytes + frame_bytes // 16 + 1024
        heap.keep_freed(RECEIVE_HIGH_WATER_MARK_FRAMES * self._max_payload_bytes)
        self._geometry = geometry
        self._whole = whole(geometry)
        self._frame_bytes = frame_bytes
        self._seal: SealName = seal
        # By number, the one that was used longest ago first; and the number that each sender uses now.
        self._sessions: OrderedDict[int, Session] = OrderedDict()
        self._incoming: dict[bytes, Incoming] = {}
        self._landed: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()
        self.dropped_frames = 0
        self._received_ns = 0
        self.control = context.socket(zmq.ROUTER)
        self.control.sndhwm = self.control.rcvhwm = 1000
        self.control.maxmsgsize = MAX_CONTROL_BYTES
        self.control.linger = 0
        self.control.router_mandatory = True
        # A sender that reconnects before its old connection has timed out is the same sender.
        self.control.router_handover = True
        if keys is not None:
            secure_server(self.control, keys, "prefill")
        bind(self.control, host, control_port, "[decode] kv_control_port")
        self.frames = context.socket(zmq.PULL)
        self.frames.rcvhwm = RECEIVE_HIGH_WATER_MARK_FRAMES
        self.frames.maxmsgsize = self._max_payload_bytes
        self.frames.linger = 0
        if keys is not None:
            self.frames.zap_domain = FRAMES_DOMAIN
        try:
            bind(self.frames, host, frames_port, "[decode] kv_port")
        except ConfigError:
            self.control.close()
            raise

    @property
    def port(self) -> int:
        """The TCP port of the control socket: where tickets point."""
        return _port(self.control)

    @property
    def frames_port(self) -> int:
        """The TCP port of the frames socket: where welcomed senders send."""
        return _port(self.frames)

    @property
    def open_tickets(self) -> int:
        """Tickets that still expect frames."""
        return len(self._incoming)

    def expect(self, ticket: str, sink: Sink, credit_chunks: int) -> None:
        """Let frames for ``ticket`` (32 hex digits) in, to ``sink``; the ticket promises ``credit_chunks``."""
        self._incoming[bytes.fromhex(ticket)] = Incoming(sink, credit_chunks)

    def grant(self, ticket: str, chunks: int) -> None:
        """Tell the sender that it may have sent ``chunks`` chunks in total on ``ticket``."""
        if incoming := self._incoming.get(bytes.fromhex(ticket)):
            incoming.chunks = max(incoming.chunks, chunks)
            for source in incoming.sources:
                self._acknowledge(ticket, incoming, source)

    def cancel(self, ticket: str, reason: str) -> None:
        """Stop expecting ``ticket``; its sink hears nothing more."""
        incoming = self._incoming.pop(bytes.fromhex(ticket), None)
        for source in incoming.sources if incoming else ():
            self._send(source.sender, Cancel(ticket=ticket, reason=reason))

    def turn(self) -> None:
        """Handle what has arrived, at most a little of it."""
        # Ready may mean no message, but what ZAP said about a new connection: ZeroMQ queues it and passes over it.
        with suppress(zmq.Again):
            for _ in range(MESSAGES_PER_TURN):
                if not is_ready(self.control, zmq.POLLIN):
                    break
                sender, *parts = self.control.recv_multipart(zmq.NOBLOCK)
                self._message(sender, parts)
        with suppress(zmq.Again):
            for _ in range(FRAMES_PER_TURN):
                if not is_ready(self.frames, zmq.POLLIN):
                    break
                frame = self.frames.recv_multipart(zmq.NOBLOCK, copy=False)
                self._received_ns = time.monotonic_ns()
                self._frame([part.buffer for part in frame])

    def close(self) -> None:
        """Close the sockets; sinks hear nothing more."""
        self._incoming.clear()
        self.control.close()
        self.frames.close()

    def _message(self, sender: bytes, parts: list[bytes]) -> None:
        try:
            if len(parts) != 1:
                raise ProtocolError(f"a KV control message has one part, not {len(parts)}")
            session = self._admit(sender, decode_to_receiver(parts[0]))
        except IsthmusError as error:
            log.warning("refused a sender", reason=str(error))
            self._send(sender, Failure(code=error.code, message=str(error)))
            return
        welcome = SenderWelcome(
            session=session.number,
            frames_port=self.frames_port,
            max_frame_bytes=self._frame_bytes,
            seal=self._seal,
            key=session.key,
            share=session.share,
        )
        self._send(sender, welcome)

    def _admit(self, sender: bytes, hello: SenderHello) -> Session:
        require_protocol(hello.protocol)
        require_same(self._geometry, hello.geometry)
        if hello.share is not None:
            require_within(hello.share, self._geometry)
        if not set(hello.codecs) & set(CODECS):
            raise CodecError(f"no codec in common: {', '.join(CODECS)} here, {', '.join(hello.codecs)} there")
        if not hello.renew:
            for session in reversed(self._sessions.values()):
                if (session.sender, session.share) == (sender, hello.share):
                    return session
        if len(self._sessions) >= MAX_SESSIONS:
            # Senders that left are not reported; one that is still there says hello again when it hears nothing.
            self._sessions.popitem(last=False)
        number = next(n for n in iter(lambda: 1 + secrets.randbelow(0xFFFF), 0) if n not in self._sessions)
        session = Session(number, sender, hello.share, self._seal, self._max_payload_bytes)
        self._sessions[number] = session
        return session

    def _frame(self, parts: list[memoryview]) -> None:
        try:
            if len(parts) not in (2, 3):
                raise ProtocolError(f"a frame has 2 or 3 parts, not {len(parts)}")
            header = frames.parse(parts[0], len(parts[1]), self._max_payload_bytes)
            session = self._sessions.get(header.session)
            if session is None:
                raise ProtocolError(f"session {header.session} is not open")
            payload = session.open(header, parts)
        except ProtocolError as error:
            self._drop(error)
            return
        self._sessions.move_to_end(session.number)
        self._take(session, header, payload)

    def _drop(self, error: ProtocolError) -> None:
        """Forget a frame that proves nothing, not even whose it is; if it was one of ours it is asked for again."""
        self.dropped_frames += 1
        if self.dropped_frames.bit_count() == 1:
            log.warning("dropped a frame", reason=str(error), dropped_frames=self.dropped_frames)

    def _take(self, session: Session, header: Header, payload: memoryview) -> None:
        ticket, sender = header.ticket.hex(), session.sender
        incoming = self._incoming.get(header.ticket)
        if incoming is None:
            if (header.ticket, sender) in self._landed:
                self._send(sender, Landed(ticket=ticket))
            elif header.kind is not Kind.ABORT:
                self._send(sender, Cancel(ticket=ticket, reason="ticket is not open"))
            return
        source = incoming.source(sender, session.share or self._whole)
        if source is None:
            log.warning("ignored a frame from a second sender", ticket=ticket)
            return
        try:
            self._accept(incoming, source, header, payload)
        except IsthmusError as error:
            self.cancel(ticket, str(error))
            incoming.sink.fail(error)

    def _accept(self, incoming: Incoming, source: Source, header: Header, payload: memoryview) -> None:
        ticket = header.ticket.hex()
        if header.kind is Kind.ABORT:
            raise LinkError(f"prefill node aborted the transfer: {bytes(payload).decode(errors='replace')}")
        if source.report is not None:
            self._send(source.sender, Landed(ticket=ticket))
            return
        if header.sequence > source.sequence:
            # A probe comes because nothing else did: the request itself may be what was lost.
            if source.asked_again != source.sequence or header.kind is Kind.PROBE:
                source.asked_again = source.sequence
                log.info("frames are missing", ticket=ticket, due=source.sequence, came=header.sequence)
                self._send(source.sender, Resend(ticket=ticket, sequence=source.sequence))
            return
        if header.kind is Kind.PROBE:
            self._acknowledge(ticket, incoming, source)
            return
        if header.sequence < source.sequence:
            return
        source.sequence += 1
        if header.kind is Kind.DATA:
            incoming.sink.data(header, payload, source.share, self._received_ns)
            return
        try:
            source.report = msgspec.msgpack.decode(payload, type=SenderReport)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"END frame does not parse: {error}") from None
        self._end(incoming, source, header.ticket)

    def _end(self, incoming: Incoming, source: Source, ticket: bytes) -> None:
        """A source has ended, and with the last one the transfer."""
        if reports := incoming.reports(self._whole):
            incoming.sink.end(joined(reports))
            self._incoming.pop(ticket, None)
        self._landed[ticket, source.sender] = None
        if len(self._landed) > MAX_REMEMBERED_TICKETS:
            self._landed.popitem(last=False)
        self._send(source.sender, Landed(ticket=ticket.hex()))

    def _acknowledge(self, ticket: str, incoming: Incoming, source: Source) -> None:
        self._send(source.sender, Credit(ticket=ticket, chunks=incoming.chunks, next_sequence=source.sequence))

    def _send(self, sender: bytes, message: FromReceiver) -> None:
        try:
            self.control.send_multipart([sender, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.info("could not answer a sender", reason=str(error))


def _port(socket: zmq.Socket[bytes]) -> int:
    return int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])
