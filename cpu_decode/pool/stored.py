"""A block of KV as it lies below RAM: a header of 160 bytes and llama.cpp's state, alike in files and on servers.

====== ===== ==================================================================
offset bytes what (little endian)
====== ===== ==================================================================
0      8     magic, ``ISTHMUSB``
8      2     version of this form
10     2     zero
12     4     tokens
16     8     position of the first token
24     8     bytes of the payload, which follows the header
32     16    seed of the pool: model, cells, engine (``transfer/blocks.py``)
48     32    name
80     16    XXH3-128 of the payload
96     56    zero
152    8     XXH3-64 of all before
====== ===== ==================================================================

The payload is what ``cpu_decode/state.py`` describes. Checksums find what a disk or a crash has done; names are what
keeps foreign KV out.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from transfer.errors import CodecError

HEADER_BYTES = 160
_MAGIC = b"ISTHMUSB"
_VERSION = 1
_HEADER = struct.Struct("<8sHHIQQ16s32s16s56x")
_SUM_BYTES = 8

Payload = npt.NDArray[np.uint8]


class CorruptBlockError(CodecError):
    """Bytes that are no intact block."""


class Header(NamedTuple):
    """All that is known of a block without its payload."""

    name: bytes
    seed: bytes
    start_token: int
    num_tokens: int
    payload_bytes: int
    checksum: bytes


class StoredBlock(NamedTuple):
    """``num_tokens`` tokens from ``start_token`` on, as llama.cpp's state in ``payload``, uint8."""

    name: bytes
    seed: bytes
    start_token: int
    num_tokens: int
    payload: Payload

    @property
    def num_bytes(self) -> int:
        """Size with its header."""
        return HEADER_BYTES + self.payload.size

    def header(self) -> bytes:
        """``HEADER_BYTES`` that stand before the payload."""
        checksum = xxhash.xxh3_128_digest(self.payload.data)
        fixed = (self.num_tokens, self.start_token, self.payload.size, self.seed, self.name, checksum)
        head = _HEADER.pack(_MAGIC, _VERSION, 0, *fixed)
        return head + xxhash.xxh3_64_digest(head)


def read_header(data: bytes) -> Header:
    """Parse the first bytes of a stored block; :class:`CorruptBlockError` if they are no header."""
    if len(data) < HEADER_BYTES:
        raise CorruptBlockError(f"a block begins with {HEADER_BYTES} bytes of header, there are {len(data)}")
    head, checksum = data[: HEADER_BYTES - _SUM_BYTES], data[HEADER_BYTES - _SUM_BYTES : HEADER_BYTES]
    magic, version, _, num_tokens, start_token, payload_bytes, seed, name, payload_sum = _HEADER.unpack(head)
    if magic != _MAGIC or xxhash.xxh3_64_digest(head) != checksum:
        raise CorruptBlockError("the header is not intact")
    if version != _VERSION:
        raise CorruptBlockError(f"the form is version {version}, this is {_VERSION}")
    return Header(name, seed, start_token, num_tokens, payload_bytes, payload_sum)


def check_payload(header: Header, payload: Payload) -> None:
    """Raise :class:`CorruptBlockError` if ``payload``, uint8, is not what ``header`` was made for."""
    if payload.size != header.payload_bytes or xxhash.xxh3_128_digest(payload.data) != header.checksum:
        raise CorruptBlockError("the payload is not intact")
