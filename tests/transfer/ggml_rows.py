"""ggml's own quantizers, as llama-cpp-python ships them."""

import ctypes
from pathlib import Path

import numpy as np
import pytest


def through_ggml(row, block_bytes, floats):
    """ggml's blocks of type ``row`` of ``floats``, uint8 ``[blocks, block_bytes]``, and what it makes of them."""
    llama_cpp = pytest.importorskip("llama_cpp")
    ggml = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so.0"))
    blocks, back = np.empty((floats.size // 32, block_bytes), np.uint8), np.empty(floats.size, np.float32)
    count = ctypes.c_int64(floats.size)
    packed = blocks.ctypes.data_as(ctypes.c_void_p)
    getattr(ggml, f"quantize_row_{row}_ref")(floats.ctypes.data_as(ctypes.c_void_p), packed, count)
    getattr(ggml, f"dequantize_row_{row}")(packed, back.ctypes.data_as(ctypes.c_void_p), count)
    return blocks, back
