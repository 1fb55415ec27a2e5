"""THE wire format of the KV plane, version 1.

A frame is one ZeroMQ message of two parts: a 64-byte header, little endian, and a payload.

======  ====  =================  ==========================================================
offset  type  field              meaning
======  ====  =================  ==========================================================
0       4s    magic              ``b"ISTH"``
4       u16   version            1
6       u8    kind               1 DATA, 2 END, 3 ABORT
7       u8    codec              wire id of the codec (``transfer/codecs.py``); 0 unless DATA
8       u8    element            type of the decoded elements: 1 bf16, 2 f16; 0 unless DATA
9       3x    reserved           zero
12      16s   ticket             the reserved landing place
28      u32   sequence           0, 1, 2, ... within a ticket
32      u32   start_token        position of the first token
36      u32   num_tokens         tokens in this frame; in END the tokens of the whole transfer
40      u16   first_layer        first layer of the group
42      u16   num_layers         layers in the group
44      u32   payload_bytes      length of the second part
48      u64   payload_checksum   XXH3-64 of the payload
56      u64   header_checksum    XXH3-64 of bytes 0..55
======  ====  =================  ==========================================================

DATA carries elements in the order of ``transfer/layout.py`` through a codec. END carries a msgpack
:class:`~transfer.stages.SenderReport`. ABORT carries a reason in UTF-8, at most 1 KiB.

Rules of change: a field is never moved or reused; new kinds and codecs take new numbers; anything else is a new
version, and a receiver refuses versions that it does not know. ``tests/golden`` holds frozen frames.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import msgspec
import xxhash

from transfer.errors import ProtocolError

MAGIC = b"ISTH"
VERSION = 1
HEADER = struct.Struct("<4sHBBB3x16sIIIHHIQ")
HEADER_BYTES = HEADER.size + 8
MAX_CONTROL_PAYLOAD_BYTES = 1024


class Kind(IntEnum):
    """What a frame is."""

    DATA = 1
    END = 2
    ABORT = 3


class Element(IntEnum):
    """Type of the elements that a DATA frame decodes to."""

    NONE = 0
    BF16 = 1
    F16 = 2


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a frame's header that the caller decides; see the module's table."""

    kind: Kind
    ticket: bytes
    sequence: int
    codec: int = 0
    element: Element = Element.NONE
    start_token: int = 0
    num_tokens: int = 0
    first_layer: int = 0
    num_layers: int = 0


def pack(header: Header, payload: bytes | bytearray | memoryview) -> bytes:
    """Header bytes for ``payload``."""
    body = HEADER.pack(
        MAGIC,
        VERSION,
        header.kind,
        header.codec,
        header.element,
        header.ticket,
        header.sequence,
        header.start_token,
        header.num_tokens,
        header.first_layer,
        header.num_layers,
        len(payload),
        xxhash.xxh3_64_intdigest(payload),
    )
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


def parse(head: bytes | memoryview, payload: bytes | memoryview, max_payload_bytes: int) -> Header:
    """Check a received frame and return its header.

    Nothing is allocated in proportion to any field. Raises :class:`ProtocolError` for a wrong size, magic, version,
    kind, element, limit or checksum; the caller checks ticket, sequence and ranges against what it reserved.
    """
    if len(head) != HEADER_BYTES:
        raise ProtocolError(f"frame header has {len(head)} bytes, not {HEADER_BYTES}")
    magic, version, *fields, payload_bytes, payload_checksum = HEADER.unpack_from(head)
    if magic != MAGIC:
        raise ProtocolError(f"frame starts with {bytes(magic)!r}, not {MAGIC!r}")
    if version != VERSION:
        raise ProtocolError(f"frame version is {version}, this node speaks {VERSION}")
    if int.from_bytes(head[HEADER.size :], "little") != xxhash.xxh3_64_intdigest(head[: HEADER.size]):
        raise ProtocolError("frame header does not match its checksum")
    kind, codec, element, ticket, sequence, start_token, num_tokens, first_layer, num_layers = fields
    if kind not in Kind.__members__.values() or element not in Element.__members__.values():
        raise ProtocolError(f"frame kind {kind} with element type {element} is unknown")
    if (codec > 0, element > 0) != (kind == Kind.DATA, kind == Kind.DATA):
        raise ProtocolError(f"frame kind {kind} does not go with codec {codec} and element type {element}")
    limit = max_payload_bytes if kind == Kind.DATA else MAX_CONTROL_PAYLOAD_BYTES
    if payload_bytes > limit:
        raise ProtocolError(f"frame payload of {payload_bytes} bytes is over the limit of {limit}")
    if payload_bytes != len(payload):
        raise ProtocolError(f"frame payload has {len(payload)} bytes, its header says {payload_bytes}")
    if payload_checksum != xxhash.xxh3_64_intdigest(payload):
        raise ProtocolError("frame payload does not match its checksum")
    return Header(
        kind=Kind(kind),
        ticket=ticket,
        sequence=sequence,
        codec=codec,
        element=Element(element),
        start_token=start_token,
        num_tokens=num_tokens,
        first_layer=first_layer,
        num_layers=num_layers,
    )
