"""No byte of a stored block changes unnoticed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_decode.pool.stored import HEADER_BYTES, CorruptBlockError, Header, check_payload, read_header
from tests.cpu_decode.pool.stored_blocks import SEED, block

BLOCK = block(3, 200)
DATA = BLOCK.header() + BLOCK.payload.tobytes()


def read(data: bytes) -> Header:
    header = read_header(data)
    check_payload(header, np.frombuffer(data, np.uint8, offset=HEADER_BYTES))
    return header


def test_what_was_written_is_read():
    header = read(DATA)
    assert header[:5] == (BLOCK.name, SEED, 192, 64, 200)
    assert len(DATA) == BLOCK.num_bytes


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_a_changed_byte_is_noticed(at, flip):
    changed = bytearray(DATA)
    changed[at] ^= flip
    with pytest.raises(CorruptBlockError):
        read(bytes(changed))


@given(st.integers(0, len(DATA) - 1))
def test_a_missing_end_is_noticed(length):
    with pytest.raises(CorruptBlockError):
        read(DATA[:length])


def test_another_version_is_named():
    import struct

    import xxhash

    head = bytearray(DATA[: HEADER_BYTES - 8])
    struct.pack_into("<H", head, 8, 9)
    with pytest.raises(CorruptBlockError, match="version 9, this is 1"):
        read_header(bytes(head) + xxhash.xxh3_64_digest(bytes(head)))
