"""The KV geometry of a GGUF, from its metadata alone."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from transfer.errors import ConfigError, UnsplittableError
from transfer.geometry import KVGeometry, fingerprint_norm

# Width of the window (0: none unless the file names one) and how often a layer without one comes, where the file is
# silent; other architectures' windows llama.cpp either ignores or we have not compared.
_WINDOW_PERIOD = {"gemma2": (4096, 2), "gemma3": (0, 6), "gpt-oss": (0, 2)}
_WINDOW_ROPE_THETA = {"gemma3": 10000.0}
# Conversion stores these architectures' norms plus one.
_NORM_OFFSET = {"gemma2": 1.0, "gemma3": 1.0}


def read_geometry(gguf: Path) -> KVGeometry:
    """Geometry of the model in ``gguf`` (key names: ``docs/gguf.md`` of ggml).

    Raises :class:`ConfigError` if the file does not parse, and its :class:`UnsplittableError` if the architecture keeps
    no plain attention KV.
    """
    from cpu_decode.gguf_header import HeaderReader

    try:
        reader = HeaderReader(gguf)
    except (OSError, ValueError, IndexError, OverflowError, struct.error) as error:
        raise ConfigError(f"{gguf} is not a readable GGUF: {error}") from None

    def field(key: str, default: Any = None) -> Any:
        found = reader.get_field(key)
        if found is None and default is None:
            raise UnsplittableError(f"{gguf} has no {key}; it cannot be split")
        return default if found is None else found.contents()

    arch = field("general.architecture")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if f"{arch}.attention.kv_lora_rank" in reader.fields or f"{arch}.ssm.state_size" in reader.fields:
        raise UnsplittableError(
            f"{gguf}: architecture {arch} keeps latent or recurrent state, which cannot be split yet"
        )
    num_layers = field(f"{arch}.block_count")
    heads = field(f"{arch}.attention.head_count")
    kv_heads = field(f"{arch}.attention.head_count_kv", heads)
    if not (isinstance(heads, int) and isinstance(kv_heads, int)):
        raise UnsplittableError(f"{gguf}: layers with different numbers of KV heads cannot be split yet")
    if not heads:
        raise UnsplittableError(f"{gguf}: architecture {arch} keeps no attention KV; it cannot be split")
    head_dim = field(f"{arch}.attention.key_length", field(f"{arch}.embedding_length") // heads)
    window, window_layers = _window(arch, num_layers, field)
    return KVGeometry(
        model_fingerprint=fingerprint_norm(_norm_as_bf16(tensors, gguf, _NORM_OFFSET.get(arch, 0.0))),
        num_layers=num_layers,
        num_kv_heads=kv_heads,
        head_dim_k=head_dim,
        head_dim_v=field(f"{arch}.attention.value_length", head_dim),
        rope_dims=field(f"{arch}.rope.dimension_count", head_dim),
        rope_theta=float(field(f"{arch}.rope.freq_base", 10000.0)),
        rope_scaling=_rope_scaling(reader, arch, tensors),
        sliding_window=window,
        vocab_size=int(reader.fields["tokenizer.ggml.tokens"].parts[-1][0]),
        window_layers=window_layers,
        window_rope_theta=_window_rope_theta(arch, field) if window_layers else 0.0,
    )


def _window(arch: str, num_layers: int, field: Callable[..., Any]) -> tuple[int, tuple[int, ...]]:
    """The window's width and the layers that have one, as llama.cpp decides (``load_swa_pattern``, src/models)."""
    if arch not in _WINDOW_PERIOD:
        return 0, ()
    default_width, default_period = _WINDOW_PERIOD[arch]
    width = field(f"{arch}.attention.sliding_window", default_width)
    pattern = field(f"{arch}.attention.sliding_window_pattern", default_period)
    if width == 0:
        return 0, ()
    flags = pattern if isinstance(pattern, list) else [layer % pattern < pattern - 1 for layer in range(num_layers)]
    return width, tuple(layer for layer, windowed in enumerate(flags) if windowed)


def _window_rope_theta(arch: str, field: Callable[..., Any]) -> float:
    same = float(field(f"{arch}.rope.freq_base", 10000.0))
    default = _WINDOW_ROPE_THETA.get(arch, same)
    return float(field(f"{arch}.rope.freq_base_swa", default))


def _rope_scaling(reader: Any, arch: str, tensors: dict[str, Any]) -> str:
    if any(name.startswith("rope_f") for name in tensors):
        return "factors"
    kind = reader.get_field(f"{arch}.rope.scaling.type")
    factor = reader.get_field(f"{arch}.rope.scaling.factor")
    if kind is None or factor is None or kind.contents() == "none":
        return "none"
    return f"{kind.contents()}:{factor.contents():g}"


def _norm_as_bf16(tensors: dict[str, Any], gguf: Path, offset: float) -> bytes:
    """The final norm less ``offset``, rounded to bf16: exact where conversion widened bf16 weights to fp32."""
    norm = tensors.get("output_norm.weight")
    if norm is None or norm.data.dtype != np.float32:
        raise UnsplittableError(f"{gguf} has no fp32 output_norm.weight; its weights cannot be identified")
    bits = (norm.data - np.float32(offset)).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return bytes(rounded.astype("<u2").tobytes())
