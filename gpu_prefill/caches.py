"""Find out, once at start, how vLLM has laid its caches out, and refuse what cannot be exported.

The packing of a CPU cache is not asked of vLLM but seen: known tokens are written with vLLM's own operator into a
scratch page and read back, so a release that packs otherwise is refused instead of exporting noise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gpu_prefill.extract import Layer
from gpu_prefill.pages import Packing, unpack
from transfer.errors import ConfigError, EngineError
from transfer.frames import Element
from transfer.geometry import KVGeometry

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

_CPU_PACKINGS: tuple[Packing, ...] = ("vec", "amx")


def require_supported(config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Raise :class:`ConfigError` for ways to run vLLM whose KV the exporter would miss or mistake."""
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        if (ranks := getattr(config.parallel_config, name)) > 1:
            raise ConfigError(f"KV export does not know ranks that share a head's tokens; set {name} to 1, not {ranks}")
    if config.lora_config is not None:
        raise ConfigError("KV export does not know LoRA adapters, whose KV the decode node could not continue")
    groups = kv_cache_config.kv_cache_groups
    kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    if any("MLA" in kind for kind in kinds):
        raise ConfigError("KV export does not know MLA, whose caches hold a latent in place of K and V")
    if len(groups) != 1 or kinds != ["FullAttentionSpec"]:
        raise ConfigError(f"KV export needs plain attention in every layer; this model's caches are {', '.join(kinds)}")


def in_layer_order(kv_caches: dict[str, Tensor], geometry: KVGeometry) -> list[Tensor]:
    """The caches by layer index, checked against the geometry; raises :class:`EngineError`.

    Each is ``[B, H, N, 2 * D]``.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    layers = [kv_caches[name] for name in sorted(kv_caches, key=extract_layer_index)]
    wanted = (geometry.num_kv_heads, geometry.head_dim_k + geometry.head_dim_v)
    for layer in layers:
        found = (layer.shape[1], layer.shape[3]) if layer.dim() == 4 else None
        if found != wanted:
            raise EngineError(f"vLLM's cache has shape {tuple(layer.shape)}; heads and width should be {wanted}")
    return layers


def as_layers(caches: Sequence[Tensor], scales: Sequence[tuple[float, float]], cache_dtype: str) -> list[Layer]:
    """The caches with what their elements are; fp8 ones, which vLLM registers as uint8, get their type and scales.

    ``cache_dtype`` is vLLM's name for it. Raises :class:`ConfigError` unless all hold bf16, all f16 or all fp8.
    """
    import torch

    kinds = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
    dtypes = list(dict.fromkeys(cache.dtype for cache in caches))
    if dtypes in ([torch.bfloat16], [torch.float16]):
        return [Layer(cache) for cache in caches]
    fp8 = kinds.get(cache_dtype)
    if fp8 is None or dtypes not in ([torch.uint8], [fp8]):
        raise ConfigError(
            f"vLLM's KV cache, {cache_dtype}, holds {', '.join(map(str, dtypes))}; run it with dtype bfloat16 or"
            " float16, and kv_cache_dtype auto or fp8 in every layer"
        )
    return [Layer(cache.view(fp8), *each) for cache, each in zip(caches, scales, strict=True)]


def scales_of(config: VllmConfig, names: Sequence[str]) -> list[tuple[float, float]]:
    """What fp8 K and V of each layer are multiplied by; :class:`ConfigError` if that is not one number each."""
    if getattr(config.cache_config, "calculate_kv_scales", False):
        raise ConfigError("KV export needs fp8 scales that stay as they are; leave calculate_kv_scales off")
    found = []
    for name in names:
        layer = config.compilation_config.static_forward_context[name]
        scales = layer._k_scale, layer._v_scale
        if any(scale.numel() != 1 for scale in scales):
            raise ConfigError(f"{name} has an fp8 scale for each head; KV export knows one for K and one for V")
        found.append((float(scales[0]), float(scales[1])))
    return found


def element_of(layers: Sequence[Layer]) -> Element:
    """The type of the elements that are exported."""
    import torch

    return Element.F16 if layers[0].row_dtype == torch.float16 else Element.BF16


def find_packing(layers: Sequence[Layer]) -> Packing:
    """How the caches pack a page; :class:`EngineError` if this vLLM packs in a way unknown here."""
    cache = layers[0].cache
    if cache.device.type != "cpu":
        return "strided"
    _, heads, block_size, width = cache.shape
    pages, k, v = _write_scratch_pages(heads, block_size, width // 2, cache.dtype)
    for packing in _CPU_PACKINGS:
        if block_size % 16 == 0 and all(
            bool((found.float() == wanted.float()).all())
            for found, wanted in zip(unpack(pages, packing), (k, v), strict=True)
        ):
            return packing
    raise EngineError("this vLLM build packs its CPU cache in an unknown way; use the version in requirements/cpu.txt")


@contextmanager
def unbound(packing: Packing) -> Iterator[None]:
    """Let threads started in the body run on every core that vLLM may use.

    OpenMP binds a CPU worker's main thread to its first core, and threads inherit that: the sender would compete with
    the attention kernels for one core. The engine process above the worker is not bound.
    """
    bound = os.sched_getaffinity(0)
    if packing != "strided":
        os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()) | bound)
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)


def _write_scratch_pages(heads: int, block_size: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Two pages as vLLM's CPU attention writes them, and the K and V, ``[2, N, H, D]``, that went in."""
    import torch
    from vllm import _custom_ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    is_fp8 = dtype.itemsize == 1
    kind, written = ("fp8_e5m2" if dtype == torch.float8_e5m2 else "fp8", torch.uint8) if is_fp8 else ("auto", dtype)
    computed = torch.bfloat16 if is_fp8 else dtype
    generator = torch.Generator().manual_seed(0)
    shape = (2, block_size, heads, dim)
    # Values that fp8 holds too.
    k, v = (torch.randn(shape, generator=generator).to(dtype).to(computed) for _ in range(2))
    pages = torch.zeros((2, heads, block_size, 2 * dim), dtype=written)
    key_cache, value_cache = pages.view(2, heads, 2 * block_size, dim).chunk(2, dim=2)
    slots = torch.arange(2 * block_size)
    # Releases before fp8 caches on a CPU take three arguments.
    isa = _get_attn_isa(computed, block_size, dim, kind) if is_fp8 else _get_attn_isa(computed, block_size, dim)
    _custom_ops.cpu_attn_reshape_and_cache(
        k.flatten(0, 1), v.flatten(0, 1), key_cache, value_cache, slots, isa,
        k_scale=1.0, v_scale=1.0, kv_cache_dtype=kind,
    )  # fmt: skip
    return pages.view(dtype), k, v
