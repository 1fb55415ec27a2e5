"""One transfer on the sending side: chunks in, frames out, credits counted. No socket, no thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from transfer import codecs, frames
from transfer.errors import ProtocolError
from transfer.frames import MAX_CONTROL_PAYLOAD_BYTES, Element, Header, Kind
from transfer.geometry import KVGeometry
from transfer.layout import Elements, Payload, layers_per_frame, plane_elements
from transfer.messages import TICKET_BYTES, Ticket
from transfer.stages import SenderReport

Frame = tuple[bytes, Payload]


class Chunk(msgspec.Struct):
    """A token range of all layers that waits to be sent: uint16 ``[num_layers, elements of one layer]``."""

    start_token: int
    num_tokens: int
    elements: Elements
    element: Element


class Outgoing:
    """The frames of one ticket, made one by one just before each leaves.

    ``released`` is called with a chunk's bytes once its last frame has been made, or the transfer is dropped.
    """

    def __init__(self, ticket: Ticket, geometry: KVGeometry, released: Callable[[int], None]) -> None:
        self.ticket = ticket
        self.deadline_ns = time.monotonic_ns() + ticket.deadline_ms * 1_000_000
        self.credit_chunks = ticket.credit_chunks
        self.total_tokens: int | None = None
        self.gather_ns = 0
        self.ended = False
        self._geometry = geometry
        self._released = released
        self._key = ticket_key(ticket.ticket)
        self._codec = codecs.by_name(ticket.codec)
        self._pending: deque[Chunk] = deque()
        self._frames: Iterator[Frame] | None = None
        self._unsent: Frame | None = None
        self._started_chunks = 0
        self._sequence = 0
        self._raw_bytes = self._wire_bytes = self._encode_ns = 0

    @property
    def has_frame(self) -> bool:
        """Whether a frame could be sent now."""
        if self._unsent is not None or self._frames is not None:
            return True
        if self._pending:
            return self._started_chunks < self.credit_chunks
        return self.total_tokens is not None and not self.ended

    def queue(self, chunk: Chunk) -> None:
        """Append a chunk."""
        self._pending.append(chunk)

    def frame(self, frame_bytes: int) -> Frame | None:
        """The frame that is due, the same one until :meth:`sent`; None if there is none.

        Raises :class:`CodecError` for KV that its codec cannot carry.
        """
        self._unsent = self._unsent or self._next(frame_bytes)
        return self._unsent

    def sent(self) -> None:
        """The frame that was due has left."""
        if self._unsent is not None:
            self._wire_bytes += sum(map(len, self._unsent))
        self._unsent = None

    def drop(self) -> None:
        """Let go of everything that waits."""
        self._frames = self._unsent = None
        for chunk in self._pending:
            self._released(chunk.elements.nbytes)
        self._pending.clear()

    def abort_frame(self, reason: str) -> Frame:
        """An ABORT that says why."""
        return self._closing_frame(Kind.ABORT, reason.encode()[:MAX_CONTROL_PAYLOAD_BYTES])

    def _next(self, frame_bytes: int) -> Frame | None:
        while self._frames is not None or self._pending:
            if self._frames is None:
                if self._started_chunks >= self.credit_chunks:
                    return None
                self._started_chunks += 1
                self._frames = self._frames_of(self._pending[0], frame_bytes)
            if frame := next(self._frames, None):
                return frame
            self._frames = None
            self._released(self._pending.popleft().elements.nbytes)
        if self.total_tokens is None or self.ended:
            return None
        self.ended = True
        return self._end_frame(self.total_tokens)

    def _frames_of(self, chunk: Chunk, frame_bytes: int) -> Iterator[Frame]:
        group = layers_per_frame(self._geometry, chunk.num_tokens, frame_bytes)
        tokens = range(chunk.start_token, chunk.start_token + chunk.num_tokens)
        for first in range(0, self._geometry.num_layers, group):
            elements = chunk.elements[first : first + group]
            planes = plane_elements(self._geometry, chunk.num_tokens) * len(elements)
            began = time.monotonic_ns()
            payload = self._codec.encode(elements.reshape(-1), chunk.element, planes, tokens)
            self._encode_ns += time.monotonic_ns() - began
            self._raw_bytes += elements.nbytes
            header = Header(
                kind=Kind.DATA,
                ticket=self._key,
                sequence=self._sequence,
                codec=self._codec.wire_id,
                element=chunk.element,
                start_token=chunk.start_token,
                num_tokens=chunk.num_tokens,
                first_layer=first,
                num_layers=len(elements),
            )
            self._sequence += 1
            yield frames.pack(header, payload), payload

    def _end_frame(self, total_tokens: int) -> Frame:
        report = SenderReport(
            num_tokens=total_tokens,
            num_frames=self._sequence,
            kv_raw_bytes=self._raw_bytes,
            kv_wire_bytes=self._wire_bytes,
            gather_ns=self.gather_ns,
            encode_ns=self._encode_ns,
        )
        return self._closing_frame(Kind.END, msgspec.msgpack.encode(report))

    def _closing_frame(self, kind: Kind, payload: bytes) -> Frame:
        header = Header(kind=kind, ticket=self._key, sequence=self._sequence, num_tokens=self.total_tokens or 0)
        return frames.pack(header, payload), payload


def ticket_key(ticket: str) -> bytes:
    """The 16 bytes that ``ticket`` spells in lower-case hex; :class:`ProtocolError` otherwise."""
    try:
        key = bytes.fromhex(ticket)
    except ValueError:
        key = b""
    if len(key) != TICKET_BYTES or key.hex() != ticket:
        raise ProtocolError(f"ticket must be {2 * TICKET_BYTES} hex digits, not {ticket[:64]!r}")
    return key
