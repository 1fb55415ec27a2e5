from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from transfer.errors import ProtocolError
from transfer.seal import KEY_BYTES, NAMES, TAG_BYTES, Opener, Seal, Sealer

KEY = bytes(range(KEY_BYTES))
HEAD = bytes(range(100, 164))
MODES = (Seal.INTEGRITY, Seal.AES_GCM)
MAX_BYTES = 1 << 12
modes = st.sampled_from(MODES)


def sealed(mode: Seal, payload: bytes, head: bytes = HEAD) -> tuple[int, bytes, bytes]:
    sealer = Sealer(KEY, mode)
    counter = sealer.take_counter()
    body, tag = sealer.seal(counter, head, payload)
    return counter, bytes(body), bytes(tag)


@given(mode=modes, payload=st.binary(max_size=MAX_BYTES), head=st.binary(max_size=64))
def test_what_is_sealed_opens(mode: Seal, payload: bytes, head: bytes) -> None:
    counter, body, tag = sealed(mode, payload, head)
    assert (len(body), len(tag)) == (len(payload), TAG_BYTES)
    assert Opener(KEY, mode, MAX_BYTES).open(counter, head, body, tag) == payload


@given(payload=st.binary(max_size=MAX_BYTES), counter=st.integers(0, (1 << 64) - 1))
def test_is_plain_gcm(payload: bytes, counter: int) -> None:
    aead, nonce = AESGCM(KEY), counter.to_bytes(12, "big")
    body, tag = Sealer(KEY, Seal.AES_GCM).seal(counter, HEAD, payload)
    assert bytes(body) + bytes(tag) == aead.encrypt(nonce, payload, HEAD)
    _, mac = Sealer(KEY, Seal.INTEGRITY).seal(counter, HEAD, payload)
    assert bytes(mac) == aead.encrypt(nonce, b"", HEAD + payload)


def test_a_published_vector() -> None:
    """Test case 2 of McGrew and Viega, The Galois/Counter Mode of Operation: key, nonce and plaintext of zeros."""
    body, tag = Sealer(bytes(16), Seal.AES_GCM).seal(0, b"", bytes(16))
    assert bytes(body).hex() == "0388dace60b6a392f328c2b971b2fe78"
    assert bytes(tag).hex() == "ab6e47d42cec13bdf53a67b21257bddf"


@pytest.mark.parametrize("mode", MODES)
def test_every_flipped_bit_is_refused(mode: Seal) -> None:
    counter, body, tag = sealed(mode, b"forty-two")
    opener = Opener(KEY, mode, MAX_BYTES)
    parts = [HEAD, body, tag]
    for index, part in enumerate(parts):
        for bit in range(8 * len(part)):
            changed = bytearray(part)
            changed[bit // 8] ^= 1 << bit % 8
            with pytest.raises(ProtocolError):
                opener.open(counter, *parts[:index], bytes(changed), *parts[index + 1 :])
    with pytest.raises(ProtocolError):
        opener.open(counter + 1, *parts)
    assert opener.open(counter, *parts) == b"forty-two"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tag_bytes", [0, 1, 4, 12, 15, 17])
def test_a_shortened_tag_is_refused(mode: Seal, tag_bytes: int) -> None:
    counter, body, tag = sealed(mode, b"payload")
    with pytest.raises(ProtocolError):
        Opener(KEY, mode, MAX_BYTES).open(counter, HEAD, body, (tag + b"x")[:tag_bytes])


@pytest.mark.parametrize("mode", MODES)
def test_another_key_mode_or_length_is_refused(mode: Seal) -> None:
    counter, body, tag = sealed(mode, b"payload")
    other = Seal.INTEGRITY if mode is Seal.AES_GCM else Seal.AES_GCM
    for opener in (Opener(KEY[::-1], mode, MAX_BYTES), Opener(KEY, other, MAX_BYTES)):
        with pytest.raises(ProtocolError):
            opener.open(counter, HEAD, body, tag)
    # The boundary between header and payload is authenticated by the header's length, which is always 64.
    with pytest.raises(ProtocolError):
        Opener(KEY, mode, MAX_BYTES).open(counter, HEAD, body[:-1], tag)


def test_a_payload_over_the_limit_is_refused() -> None:
    counter, body, tag = sealed(Seal.AES_GCM, bytes(MAX_BYTES + 1))
    with pytest.raises(ProtocolError, match="limit"):
        Opener(KEY, Seal.AES_GCM, MAX_BYTES).open(counter, HEAD, body, tag)


@pytest.mark.parametrize("mode", MODES)
def test_a_counter_is_given_once_and_only_so_often(mode: Seal) -> None:
    sealer = Sealer(KEY, mode, max_frames=5)
    counters = []
    while not sealer.exhausted:
        counters.append(sealer.take_counter())
    assert len(set(counters)) == len(counters) == 5
    with pytest.raises(ProtocolError, match="new one"):
        sealer.take_counter()
    assert len(set(counters)) == 5


def test_integrity_copies_nothing() -> None:
    payload = np.arange(1000, dtype=np.uint8).data
    sealer = Sealer(KEY, Seal.INTEGRITY)
    body, tag = sealer.seal(1, HEAD, payload)
    assert body is payload
    opened = Opener(KEY, Seal.INTEGRITY, 1000).open(1, HEAD, payload, tag)
    assert np.shares_memory(np.frombuffer(opened, np.uint8), np.frombuffer(payload, np.uint8))


def test_plaintexts_share_one_buffer_and_ciphertexts_do_not() -> None:
    sealer, opener = Sealer(KEY, Seal.AES_GCM), Opener(KEY, Seal.AES_GCM, 100)
    (one, one_tag), (two, two_tag) = (sealer.seal(counter, HEAD, bytes([counter] * 50)) for counter in (1, 2))
    first = opener.open(1, HEAD, one, one_tag)
    assert first == bytes([1] * 50)
    assert opener.open(2, HEAD, two, two_tag) == first == bytes([2] * 50)


def test_every_name_of_the_file_has_a_number() -> None:
    assert {name: int(seal) for name, seal in NAMES.items()} == {"none": 0, "integrity": 1, "aes-gcm": 2}
