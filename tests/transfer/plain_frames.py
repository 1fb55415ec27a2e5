"""Frames without a seal, packed and parsed in one go."""

import msgspec

from transfer import frames
from transfer.errors import ProtocolError


def pack(header, payload):
    """Header bytes of an unsealed frame."""
    return frames.pack(header, len(payload), frames.checksum(payload))


def parse(head, payload, limit):
    """The header of an unsealed frame that is whole, as its sender wrote it."""
    header = frames.parse(head, len(payload), limit)
    if header.check != frames.checksum(payload):
        raise ProtocolError("frame payload does not match its checksum")
    return msgspec.structs.replace(header, check=0)
