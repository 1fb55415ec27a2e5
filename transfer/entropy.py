"""Zstandard (RFC 8878) as an entropy coder: codes and exponents hold hardly any repeats, only uneven frequencies."""

from __future__ import annotations

import zstandard

from transfer.errors import CodecError
from transfer.layout import Bytes

_WINDOW_LOG = 18
# The shortest search for repeats that the library allows; looking further costs time and gains nothing.
_PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=_WINDOW_LOG,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    write_content_size=True,
)


def compress(plane: Bytes) -> bytes:
    """One frame of ``plane``, contiguous uint8 ``[n]``, that declares its content size."""
    return zstandard.ZstdCompressor(compression_params=_PARAMETERS).compress(plane.data)


def decompress(packed: memoryview, num_bytes: int) -> bytes:
    """The ``num_bytes`` bytes of a frame; :class:`CodecError` if it is corrupt or declares another size."""
    try:
        # The declared size is what decompression allocates.
        declared_bytes = zstandard.frame_content_size(packed)
        if declared_bytes != num_bytes:
            raise CodecError(f"zstd frame declares {declared_bytes} bytes, not {num_bytes}")
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG)
        return decompressor.decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"zstd frame is corrupt: {error}") from None
