"""Authenticated encryption of frames: AES-128-GCM (NIST SP 800-38D) under a key that one session uses and no other.

``integrity`` authenticates and does not hide: GMAC, which is GCM with everything as associated data. A nonce is the
frame's counter in 12 big-endian bytes; a :class:`Sealer` gives each counter once and stops before it has to repeat one.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Literal

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from transfer.errors import ProtocolError
from transfer.layout import Payload

KEY_BYTES = 16
TAG_BYTES = 16
MAX_FRAMES = 1 << 32

SealName = Literal["none", "integrity", "aes-gcm"]


class Seal(IntEnum):
    """How a frame is protected; the numbers are on the wire."""

    NONE = 0
    INTEGRITY = 1
    AES_GCM = 2


NAMES: dict[SealName, Seal] = {"none": Seal.NONE, "integrity": Seal.INTEGRITY, "aes-gcm": Seal.AES_GCM}


class Sealer:
    """The sending end of a session: ``key`` of 16 bytes, at most ``max_frames`` frames."""

    def __init__(self, key: bytes, mode: Seal, *, max_frames: int = MAX_FRAMES) -> None:
        self.mode = mode
        self._key = key
        self._aead = AESGCM(key)
        self._left = max_frames
        self._counter = 0

    @property
    def exhausted(self) -> bool:
        """Whether every counter has been given."""
        return self._left == 0

    def take_counter(self) -> int:
        """A counter that no other frame of this session has; raises :class:`ProtocolError` when there is none left."""
        if self.exhausted:
            raise ProtocolError("the session has sealed as many frames as its key may; it needs a new one")
        self._left -= 1
        self._counter += 1
        return self._counter

    def seal(self, counter: int, head: bytes, payload: Payload) -> tuple[Payload, bytes | memoryview]:
        """Ciphertext in a buffer of its own (for ``integrity`` the payload itself), and the tag of 16 bytes."""
        if self.mode is Seal.INTEGRITY:
            return payload, _mac(self._key, counter, head, payload)
        sealed = np.empty(len(payload) + TAG_BYTES, np.uint8).data
        self._aead.encrypt_into(_nonce(counter), payload, head, sealed)
        return sealed[: len(payload)], sealed[len(payload) :]


class Opener:
    """The receiving end of a session: ``key`` of 16 bytes, payloads of at most ``max_payload_bytes``."""

    def __init__(self, key: bytes, mode: Seal, max_payload_bytes: int) -> None:
        self.mode = mode
        self._key = key
        self._max_payload_bytes = max_payload_bytes
        self._plain = np.empty(max_payload_bytes if mode is Seal.AES_GCM else 0, np.uint8).data

    def open(self, counter: int, head: Payload, payload: Payload, tag: Payload) -> memoryview:
        """The plaintext, valid until the next call; raises :class:`ProtocolError` if anything was changed."""
        if len(tag) != TAG_BYTES:
            raise ProtocolError(f"tag has {len(tag)} bytes, not {TAG_BYTES}")
        if len(payload) > self._max_payload_bytes:
            raise ProtocolError(f"payload of {len(payload)} bytes is over the limit of {self._max_payload_bytes}")
        try:
            decryptor = Cipher(algorithms.AES(self._key), modes.GCM(_nonce(counter), bytes(tag))).decryptor()
            decryptor.authenticate_additional_data(head)
            if self.mode is Seal.INTEGRITY:
                decryptor.authenticate_additional_data(payload)
                plain = memoryview(payload)
            else:
                plain = self._plain[: len(payload)]
                decryptor.update_into(payload, plain)
            decryptor.finalize()
        except InvalidTag:
            raise ProtocolError("frame does not match its seal") from None
        return plain


def _mac(key: bytes, counter: int, head: bytes, payload: Payload) -> bytes:
    encryptor = Cipher(algorithms.AES(key), modes.GCM(_nonce(counter))).encryptor()
    encryptor.authenticate_additional_data(head)
    encryptor.authenticate_additional_data(payload)
    encryptor.finalize()
    return encryptor.tag


def _nonce(counter: int) -> bytes:
    return counter.to_bytes(12, "big")
