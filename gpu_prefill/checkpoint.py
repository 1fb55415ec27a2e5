"""The one tensor that identifies a checkpoint, read straight from safetensors.

A safetensors file is a u64 header length, a JSON header ``{name: {dtype, shape, data_offsets}}`` and the data, all
little endian (https://github.com/huggingface/safetensors, "Format"). numpy knows no bf16, so the bytes are read here.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from transfer import kernels
from transfer.errors import ConfigError
from transfer.frames import Element

FINAL_NORM = "model.norm.weight"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# The limit that the format itself sets.
_MAX_HEADER_BYTES = 100_000_000


class _Tensor(msgspec.Struct):
    """One entry of a safetensors header; offsets count from the end of the header."""

    dtype: str
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_final_norm(hf_dir: Path) -> bytes:
    """The bf16 bytes of ``model.norm.weight``, ``[hidden_size]``, little endian; f16 and f32 are rounded to bf16.

    Raises :class:`ConfigError` if the checkpoint is missing, damaged or stores the norm in another type.
    """
    path = hf_dir / _shard(hf_dir)
    try:
        dtype, data = _read_tensor(path, FINAL_NORM)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(f"{path} is not a sound safetensors file: {error}") from None
    match dtype:
        case "BF16":
            return data
        case "F16":
            return _bf16_of_f16(np.frombuffer(data, np.dtype("<u2")))
        case "F32":
            return _bf16_of_f32(np.frombuffer(data, np.dtype("<u4")))
    raise ConfigError(f"{path}: {FINAL_NORM} is stored as {dtype}; only BF16, F16 and F32 are read")


def _shard(hf_dir: Path) -> str:
    """Name of the file that holds the final norm."""
    index = hf_dir / _INDEX
    if not index.is_file():
        return _SINGLE
    try:
        weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except msgspec.DecodeError as error:
        raise ConfigError(f"{index}: {error}") from None
    if FINAL_NORM not in weight_map:
        raise ConfigError(f"{index} does not list {FINAL_NORM}")
    return weight_map[FINAL_NORM]


def _read_tensor(path: Path, name: str) -> tuple[str, bytes]:
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > _MAX_HEADER_BYTES:
            raise ValueError(f"its header claims {header_bytes} bytes")
        header = msgspec.json.decode(file.read(header_bytes), type=dict[str, msgspec.Raw])
        if name not in header:
            raise ValueError(f"it does not hold {name}")
        tensor = msgspec.json.decode(header[name], type=_Tensor)
        begin, end = tensor.data_offsets
        if not 0 <= begin <= end <= path.stat().st_size - 8 - header_bytes:
            raise ValueError(f"{name} lies outside the file")
        file.seek(8 + header_bytes + begin)
        return tensor.dtype, file.read(end - begin)


def _bf16_of_f16(bits: np.ndarray[tuple[int], np.dtype[np.uint16]]) -> bytes:
    rounded = np.empty(bits.size, np.uint16)
    kernels.convert(bits, rounded, Element.F16, Element.BF16)
    return rounded.tobytes()


def _bf16_of_f32(bits: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> bytes:
    """Round to nearest even; norm weights are finite."""
    wide = bits.astype(np.uint64)
    return bytes(((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype("<u2").tobytes())
