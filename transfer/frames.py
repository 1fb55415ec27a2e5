"""THE wire format of the KV plane, version 1.

A frame is one ZeroMQ message: a 64-byte header, little endian, a payload and, if it is sealed, a 16-byte tag.

======  ====  =================  ==========================================================
offset  type  field              meaning
======  ====  =================  ==========================================================
0       4s    magic              ``b"ISTH"``
4       u16   version            1
6       u8    kind               1 DATA, 2 END, 3 ABORT, 4 PROBE
7       u8    codec              wire id of the codec (``transfer/codecs.py``); 0 unless DATA
8       u8    element            type of the decoded elements: 1 bf16, 2 f16; 0 unless DATA
9       u8    seal               0 none, 1 integrity, 2 aes-gcm (``transfer/seal.py``)
10      u16   session            number that the receiver gave this sender (``SenderWelcome``)
12      16s   ticket             the reserved landing place
28      u32   sequence           0, 1, 2, ... within a ticket; PROBE repeats the number that comes next
32      u32   start_token        position of the first token
36      u32   num_tokens         tokens in this frame; in END the position after the last token
40      u16   first_layer        first layer of the group
42      u16   num_layers         layers in the group
44      u32   payload_bytes      length of the second part
48      u64   check              XXH3-64 of the payload; in a sealed frame the counter of its nonce
56      u64   header_checksum    XXH3-64 of bytes 0..55
======  ====  =================  ==========================================================

DATA carries elements in the order of ``transfer/layout.py`` through a codec. END carries a msgpack
:class:`~transfer.stages.SenderReport`. ABORT carries a reason in UTF-8, at most 1 KiB. PROBE is empty and asks where
the receiver stands: every frame sent before it has come, or is lost.

Rules of change: a field is never moved or reused; new kinds and codecs take new numbers; anything else is a new
version, and a receiver refuses versions that it does not know. ``tests/golden`` holds frozen frames.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import msgspec
import xxhash

from transfer.errors import ProtocolError
from transfer.layout import Payload
from transfer.seal import Seal

MAGIC = b"ISTH"
VERSION = 1
HEADER = struct.Struct("<4sHBBBBH16sIIIHHIQ")
HEADER_BYTES = HEADER.size + 8
MAX_CONTROL_PAYLOAD_BYTES = 1024


class Kind(IntEnum):
    """What a frame is."""

    DATA = 1
    END = 2
    ABORT = 3
    PROBE = 4


class Element(IntEnum):
    """Type of the elements that a DATA frame decodes to."""

    NONE = 0
    BF16 = 1
    F16 = 2


_KINDS, _ELEMENTS, _SEALS = (frozenset(map(int, kind)) for kind in (Kind, Element, Seal))


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a frame's header; see the module's table. :func:`pack` sets ``check``."""

    kind: Kind
    ticket: bytes
    sequence: int
    codec: int = 0
    element: Element = Element.NONE
    seal: Seal = Seal.NONE
    session: int = 0
    start_token: int = 0
    num_tokens: int = 0
    first_layer: int = 0
    num_layers: int = 0
    check: int = 0


def checksum(payload: Payload) -> int:
    """XXH3-64 of ``payload``: the ``check`` of a frame that is not sealed."""
    return xxhash.xxh3_64_intdigest(payload)


def pack(header: Header, payload_bytes: int, check: int) -> bytes:
    """Header bytes for a payload of ``payload_bytes``; ``header.check`` is not looked at."""
    body = HEADER.pack(
        MAGIC,
        VERSION,
        header.kind,
        header.codec,
        header.element,
        header.seal,
        header.session,
        header.ticket,
        header.sequence,
        header.start_token,
        header.num_tokens,
        header.first_layer,
        header.num_layers,
        payload_bytes,
        check,
    )
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


def parse(head: bytes | memoryview, payload_bytes: int, max_payload_bytes: int) -> Header:
    """Check a received frame's header against itself and against the length of the payload that came with it.

    Nothing is allocated in proportion to any field. Raises :class:`ProtocolError` for a wrong size, magic, version,
    kind, element, seal, limit or checksum. The payload is not looked at: whoever reads it compares :func:`checksum`
    with ``check``, or opens the seal, first.
    """
    if len(head) != HEADER_BYTES:
        raise ProtocolError(f"frame header has {len(head)} bytes, not {HEADER_BYTES}")
    magic, version, *fields, announced_bytes, check = HEADER.unpack_from(head)
    if magic != MAGIC:
        raise ProtocolError(f"frame starts with {bytes(magic)!r}, not {MAGIC!r}")
    if version != VERSION:
        raise ProtocolError(f"frame version is {version}, this node speaks {VERSION}")
    if int.from_bytes(head[HEADER.size :], "little") != xxhash.xxh3_64_intdigest(head[: HEADER.size]):
        raise ProtocolError("frame header does not match its checksum")
    kind, codec, element, seal, session, ticket, sequence, start_token, num_tokens, first_layer, num_layers = fields
    if kind not in _KINDS or element not in _ELEMENTS or seal not in _SEALS:
        raise ProtocolError(f"frame kind {kind} with element type {element} and seal {seal} is unknown")
    if (codec > 0, element > 0) != (kind == Kind.DATA, kind == Kind.DATA):
        raise ProtocolError(f"frame kind {kind} does not go with codec {codec} and element type {element}")
    limit = max_payload_bytes if kind == Kind.DATA else MAX_CONTROL_PAYLOAD_BYTES
    if announced_bytes > limit:
        raise ProtocolError(f"frame payload of {announced_bytes} bytes is over the limit of {limit}")
    if announced_bytes != payload_bytes:
        raise ProtocolError(f"frame payload has {payload_bytes} bytes, its header says {announced_bytes}")
    return Header(
        kind=Kind(kind),
        ticket=ticket,
        sequence=sequence,
        codec=codec,
        element=Element(element),
        seal=Seal(seal),
        session=session,
        start_token=start_token,
        num_tokens=num_tokens,
        first_layer=first_layer,
        num_layers=num_layers,
        check=check,
    )
