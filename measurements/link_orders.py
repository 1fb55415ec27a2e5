"""What the two processes of ``isthmus measure link`` say to each other: orders and answers, one of each in turn.

ZeroMQ REQ (the measuring process) to REP (the serving one), msgpack, in the clear. Nothing here needs to be secret:
values are synthetic, and the CURVE keys in :class:`Greeted` are made for one run and open nothing else. Every number
has a limit, so that whoever reaches the port can make the serving process work, but not fill its memory or hang it.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from transfer.errors import ProtocolError
from transfer.frames import HEADER_BYTES
from transfer.messages import Ticket
from transfer.seal import SealName

VERSION = 1
MAX_ORDER_BYTES = 64 << 10
MAX_TOKENS = 65_536
# One layer of more would not fit a frame.
MAX_CHUNK_TOKENS = 1024
# Tokens that may be in flight to landing buffers: 1 GiB of Llama-3.1-8B's.
MAX_LANDING_TOKENS = 8192
# Bare messages have a part as long as a frame's header, and one as long as its payload.
BARE_HEADER = bytes(HEADER_BYTES)
# Longer than any transfer on a sound link of 1 Gbit/s.
PATIENCE_S = 120.0
T = TypeVar("T")


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of orders and answers; the tag is the class name."""


class Greet(Message, frozen=True, kw_only=True):
    """The first order of a run."""

    version: int = VERSION


class Receive(Message, frozen=True, kw_only=True):
    """Expect one transfer through the whole plane; answered with :class:`Expecting`.

    With ``fresh`` the landing buffers are new ones, so that the memory they take shows.
    """

    codec: Annotated[str, msgspec.Meta(max_length=32)]
    seal: SealName
    num_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
    chunk_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHUNK_TOKENS)]
    credit_chunks: Annotated[int, msgspec.Meta(ge=1, le=MAX_LANDING_TOKENS)]
    fresh: bool = False


class ReceiveBare(Message, frozen=True, kw_only=True):
    """Expect ``messages`` bare ZeroMQ messages; throw them away, or copy each to a buffer first if ``copied``."""

    messages: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    copied: bool = False


class ServeIperf(Message, frozen=True, kw_only=True):
    """Start an iperf3 server for one test."""


class Await(Message, frozen=True, kw_only=True):
    """Answer when what was expected last has come; with :class:`Done`."""


class Leave(Message, frozen=True, kw_only=True):
    """The run is over."""


class Greeted(Message, frozen=True, kw_only=True):
    """The keys of this run, Z85 text, by which the KV plane lets the sender in; whether iperf3 is installed."""

    public: bytes
    secret: bytes
    server: bytes
    has_iperf3: bool
    version: int = VERSION


class Expecting(Message, frozen=True, kw_only=True):
    """A landing place is ready."""

    ticket: Ticket


class Listening(Message, frozen=True, kw_only=True):
    """Bare messages, or iperf3, go to TCP ``port`` of the same host."""

    port: int


class Done(Message, frozen=True, kw_only=True):
    """What came cost this: times in ns, and the process's CPU time (kernel's share included) since the order.

    ``wire_ns`` is from the first frame's arrival to END; ``encode_ns`` is the sender's. ``landing_bytes`` is the most
    that landing buffers held at once, ``grown_bytes`` by how much the process's resident memory grew at most.
    """

    cpu_ns: int
    encode_ns: int = 0
    wire_ns: int = 0
    decode_frame_ns: int = 0
    kv_wire_bytes: int = 0
    landing_bytes: int = 0
    grown_bytes: int = 0


class Refused(Message, frozen=True, kw_only=True):
    """An order that cannot be carried out, or that failed."""

    reason: str


Order = Greet | Receive | ReceiveBare | ServeIperf | Await | Leave
Answer = Greeted | Expecting | Listening | Done | Refused

_orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def encode(message: Message) -> bytes:
    """One order or answer as msgpack."""
    return msgspec.msgpack.encode(message)


def decode_order(data: bytes) -> Order:
    """Parse an order; :class:`ProtocolError` says what is wrong with it."""
    return _decode(_orders, data)


def decode_answer(data: bytes) -> Answer:
    """Parse an answer; :class:`ProtocolError` says what is wrong with it."""
    return _decode(_answers, data)


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    if len(data) > MAX_ORDER_BYTES:
        raise ProtocolError(f"message of {len(data)} bytes is over the limit of {MAX_ORDER_BYTES}")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"message does not parse: {error}") from None
