"""One transfer on the sending side: slabs in, frames out, credits and losses counted. No socket, no thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np

from transfer import codecs
from transfer.errors import LinkError, ProtocolError
from transfer.frames import MAX_CONTROL_PAYLOAD_BYTES, Element, Header, Kind
from transfer.geometry import KVGeometry
from transfer.layout import Elements, Payload, Slab, frame_elements
from transfer.messages import TICKET_BYTES, Ticket
from transfer.stages import SenderReport

# A silent receiver is asked where it stands after this long, and then less and less often.
FIRST_PROBE_NS = 250_000_000
MAX_PROBE_NS = 2_000_000_000
# A link that loses the same frames again and again will not deliver them.
MAX_FRUITLESS_REWINDS = 100


class Unsealed(NamedTuple):
    """A frame before the link has put its session on it."""

    header: Header
    payload: Payload


class Part(NamedTuple):
    """KV that becomes one frame or more: ``elements`` is uint16 ``[layers, elements of one layer for tokens]``.

    What is ``encoded`` is the payload of one frame already, in as many equal rows. ``chunk`` counts the token ranges of
    a transfer from 0 on.
    """

    tokens: range
    first_layer: int
    elements: Elements
    element: Element
    encoded: bool = False
    chunk: int = 0


class Outgoing:
    """The frames of one ticket, made one by one just before each leaves, and made again if they were lost.

    A part is kept until the receiver says that it has landed; ``released`` is then called with its bytes.
    """

    def __init__(self, ticket: Ticket, geometry: KVGeometry, released: Callable[[int], None]) -> None:
        now = time.monotonic_ns()
        self.ticket = ticket
        self.deadline_ns = now + ticket.deadline_ms * 1_000_000
        self.credit_chunks = ticket.credit_chunks
        self.end_token: int | None = None
        self.gather_ns = self.d2h_ns = 0
        self.resent_frames = 0
        self._geometry = geometry
        self._released = released
        self._key = ticket_key(ticket.ticket)
        self._codec = codecs.by_name(ticket.codec)
        self._chunk_of: dict[int, int] = {}
        self._waiting: deque[Part] = deque()
        # Frames that may have to be made again, by ascending sequence; None is END. Those before the cursor have left.
        self._unacknowledged: deque[Part | None] = deque()
        self._first_sequence = 0
        self._cursor = 0
        self._frames_sent = 0
        self._fruitless_rewinds = 0
        self._heard_ns = now
        self._probe_ns = FIRST_PROBE_NS
        self._raw_bytes = self._wire_bytes = self._encode_ns = 0

    @property
    def next_sequence(self) -> int:
        """Sequence number of the frame that leaves next."""
        return self._first_sequence + self._cursor

    @property
    def has_frame(self) -> bool:
        """Whether a frame could be sent now."""
        return self._cursor < len(self._unacknowledged) or self._next_part() is not None or self._end_is_due

    def queue(self, part: Part) -> None:
        """Append some layers of a chunk; which chunk it is, is found out here."""
        chunk = self._chunk_of.setdefault(part.tokens.start, len(self._chunk_of))
        self._waiting.append(part._replace(chunk=chunk))

    def frame(self, frame_bytes: int) -> Unsealed | None:
        """The frame that is due, of at most ``frame_bytes`` of elements; None if there is none.

        It stays due until :meth:`sent`. Raises :class:`CodecError` for KV that its codec cannot carry, and
        :class:`LinkError` for a payload that is longer than a frame.
        """
        if self._cursor == len(self._unacknowledged) and not self._take(frame_bytes):
            return None
        part = self._unacknowledged[self._cursor]
        return self._end_frame() if part is None else self._data_frame(part)

    def sent(self, wire_bytes: int) -> None:
        """The frame that was due has left, as ``wire_bytes``."""
        part = self._unacknowledged[self._cursor]
        if self.next_sequence < self._frames_sent:
            self.resent_frames += 1
        elif part is not None:
            self._raw_bytes += 2 * frame_elements(self._geometry, len(part.tokens), len(part.elements))
        self._wire_bytes += wire_bytes
        self._cursor += 1
        self._frames_sent = max(self._frames_sent, self.next_sequence)

    def heard(self, now_ns: int) -> None:
        """The receiver has said something about this transfer."""
        self._heard_ns = now_ns
        self._probe_ns = FIRST_PROBE_NS

    def acknowledge(self, next_sequence: int) -> None:
        """Frames before ``next_sequence`` have landed: let go of them."""
        while self._unacknowledged and self._first_sequence < min(next_sequence, self._frames_sent):
            part = self._unacknowledged.popleft()
            self._first_sequence += 1
            self._cursor = max(0, self._cursor - 1)
            self._fruitless_rewinds = 0
            if part is not None:
                self._released(part.elements.nbytes)

    def rewind(self, sequence: int) -> None:
        """Frames from ``sequence`` on are lost; raises :class:`LinkError` if that goes on without progress."""
        self.acknowledge(sequence)
        if sequence < self.next_sequence:
            self._fruitless_rewinds += 1
            if self._fruitless_rewinds > MAX_FRUITLESS_REWINDS:
                raise LinkError(f"frame {sequence} was lost {MAX_FRUITLESS_REWINDS} times")
            self._cursor = max(0, sequence - self._first_sequence)

    def wants_probe(self, now_ns: int) -> bool:
        """Whether the receiver has been silent for too long about what it owes: an acknowledgement or a credit."""
        waits = bool(self._unacknowledged or self._waiting)
        if not waits or now_ns - self._heard_ns < self._probe_ns:
            return False
        self._heard_ns = now_ns
        self._probe_ns = min(2 * self._probe_ns, MAX_PROBE_NS)
        return True

    def probe_frame(self) -> Unsealed:
        """A PROBE: it asks what has come of everything sent so far."""
        return Unsealed(Header(kind=Kind.PROBE, ticket=self._key, sequence=self.next_sequence), b"")

    def abort_frame(self, reason: str) -> Unsealed:
        """An ABORT that says why."""
        header = Header(kind=Kind.ABORT, ticket=self._key, sequence=self.next_sequence)
        return Unsealed(header, reason.encode()[:MAX_CONTROL_PAYLOAD_BYTES])

    def drop(self) -> None:
        """Let go of everything."""
        for part in (*self._waiting, *self._unacknowledged):
            if part is not None:
                self._released(part.elements.nbytes)
        self._waiting.clear()
        self._unacknowledged.clear()

    def _next_part(self) -> int | None:
        """Index of the first waiting part whose chunk has a credit."""
        return next((at for at, part in enumerate(self._waiting) if part.chunk < self.credit_chunks), None)

    @property
    def _end_is_due(self) -> bool:
        ended = bool(self._unacknowledged) and self._unacknowledged[-1] is None
        return self.end_token is not None and not self._waiting and not ended

    def _take(self, frame_bytes: int) -> bool:
        """Move what is due next to the frames under way; False if nothing is."""
        at = self._next_part()
        if at is None:
            if self._end_is_due:
                self._unacknowledged.append(None)
            return bool(self._unacknowledged) and self._cursor < len(self._unacknowledged)
        part = self._waiting[at]
        layers = max(1, frame_bytes // (part.elements[0].nbytes))
        if layers < len(part.elements):
            if part.encoded:
                raise LinkError(
                    f"frame of {part.elements.nbytes} bytes is encoded already and cannot be cut to the worker's"
                    f" {frame_bytes}; set [link] frame_mib alike on both nodes"
                )
            self._waiting[at] = part._replace(first_layer=part.first_layer + layers, elements=part.elements[layers:])
            part = part._replace(elements=part.elements[:layers])
        else:
            del self._waiting[at]
        self._unacknowledged.append(part)
        return True

    def _data_frame(self, part: Part) -> Unsealed:
        began = time.monotonic_ns()
        elements = part.elements.reshape(-1)
        slab = Slab(self._geometry, len(part.elements), part.tokens)
        codec = self._codec.of_frame(slab.planes)
        if part.encoded:
            payload: Payload = elements.view(np.uint8).data
        else:
            payload = codec.encode(elements, part.element, slab)
        self._encode_ns += time.monotonic_ns() - began
        header = Header(
            kind=Kind.DATA,
            ticket=self._key,
            sequence=self.next_sequence,
            codec=codec.wire_id,
            element=part.element,
            start_token=part.tokens.start,
            num_tokens=len(part.tokens),
            first_layer=part.first_layer,
            num_layers=len(part.elements),
        )
        return Unsealed(header, payload)

    def _end_frame(self) -> Unsealed:
        report = SenderReport(
            num_tokens=self.end_token or 0,
            num_frames=self.next_sequence,
            kv_raw_bytes=self._raw_bytes,
            kv_wire_bytes=self._wire_bytes,
            gather_ns=self.gather_ns,
            encode_ns=self._encode_ns,
            d2h_ns=self.d2h_ns,
            resent_frames=self.resent_frames,
        )
        header = Header(kind=Kind.END, ticket=self._key, sequence=self.next_sequence, num_tokens=report.num_tokens)
        return Unsealed(header, msgspec.msgpack.encode(report))


def ticket_key(ticket: str) -> bytes:
    """The 16 bytes that ``ticket`` spells in lower-case hex; :class:`ProtocolError` otherwise."""
    try:
        key = bytes.fromhex(ticket)
    except ValueError:
        key = b""
    if len(key) != TICKET_BYTES or key.hex() != ticket:
        raise ProtocolError(f"ticket must be {2 * TICKET_BYTES} hex digits, not {ticket[:64]!r}")
    return key
