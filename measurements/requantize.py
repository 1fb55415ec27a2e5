"""A GGUF's weights in another type, written by llama.cpp's own quantizer."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from pathlib import Path

from transfer.errors import EngineError


class FileType(IntEnum):
    """Of enum llama_ftype (llama.cpp's include/llama.h). fp32 holds what any quantized weight stands for."""

    F32 = 0
    Q8_0 = 7
    BF16 = 32


def requantized(gguf: Path, target: Path, file_type: FileType) -> Path:
    """Write the model of ``gguf`` with weights of ``file_type`` to ``target``, which is returned.

    Raises :class:`EngineError` where llama.cpp cannot.
    """
    import llama_cpp

    from cpu_decode.llama import log_errors_only

    log_errors_only()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = file_type, True
    code = llama_cpp.llama_model_quantize(str(gguf).encode(), str(target).encode(), ctypes.byref(params))
    if code:
        raise EngineError(f"llama_model_quantize returned {code} for {target}; is there room for it?")
    return target
