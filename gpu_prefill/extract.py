"""Paged blocks to chunks: the elements of a token range of all layers, in the order of ``transfer/layout.py``.

Two ways to the same rows. On a host, whole blocks are copied out and reordered while they are in a core's cache. On a
device one operation takes K's or V's tokens from wherever they lie straight to their place.

An fp8 cache holds ``value / scale``, with a scale for K and one for V of each layer; its rows are
``bf16(f32(element) * scale)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpu_prefill.pages import Packing, unpack
from transfer.layout import Elements

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Layer(NamedTuple):
    """One layer's cache, ``[B, H, N, 2 * D]`` of bf16, f16 or an fp8 type, and what fp8 is multiplied by."""

    cache: Tensor
    k_scale: float = 1.0
    v_scale: float = 1.0

    @property
    def row_dtype(self) -> torch.dtype:
        """The type of what is exported: the cache's, or bf16 for fp8."""
        import torch

        return self.cache.dtype if self.cache.element_size() == 2 else torch.bfloat16


class Places(NamedTuple):
    """Where tokens lie: int64 ``[num_tokens]`` on the caches' device, the block of each and its place in it."""

    block_ids: Tensor
    offsets: Tensor


def gather(
    layers: Sequence[Layer],
    packing: Packing,
    block_ids: Sequence[int],
    start: int,
    end: int,
    interleave_dims: int = 0,
) -> Elements:
    """Copy tokens ``[start, end)`` of one request out of its blocks, to the host.

    Arguments are those of :func:`gather_rows`. Returns uint16 ``[num_layers, 2 * (end - start) * H * D]``. On a GPU the
    copy is ordered after what its current stream has queued, and waited for.
    """
    import torch

    rows = gather_rows(layers, packing, block_ids, start, end, interleave_dims)
    host: Elements = rows.cpu().view(torch.int16).numpy().view(np.uint16)
    return host.reshape(len(layers), -1)


def gather_rows(
    layers: Sequence[Layer],
    packing: Packing,
    block_ids: Sequence[int],
    start: int,
    end: int,
    interleave_dims: int = 0,
) -> Tensor:
    """Tokens ``[start, end)`` of one request as ``[num_layers, 2, end - start, H, D]``, on the caches' device.

    ``layers`` are on one device; block ``i`` of ``block_ids`` holds tokens ``[i * N, (i + 1) * N)``. If
    ``interleave_dims`` is not 0, the first so many elements of each head of K go from "half" to "interleaved" order.
    Raises :class:`ValueError` for tokens beyond the blocks.
    """
    import torch

    cache = layers[0].cache
    _, heads, block_size, width = cache.shape
    dim, num_tokens = width // 2, end - start
    first, last = start // block_size, -(-end // block_size)
    _require_blocks(block_ids, end, block_size)
    blocks = torch.tensor(block_ids[first:last], dtype=torch.int64, device=cache.device)
    out = torch.empty((len(layers), 2, num_tokens, heads, dim), dtype=layers[0].row_dtype, device=cache.device)
    for layer, rows in zip(layers, out, strict=True):
        k, v = unpack(layer.cache.index_select(0, blocks), packing)
        for pages, place in (*_k_parts(k, rows[0], interleave_dims), (v, rows[1])):
            _copy_tokens(pages, place, start - first * block_size)
        _scale(rows, layer)
    return out


def find(
    to_device: Callable[[Sequence[int]], Tensor], block_ids: Sequence[int], tokens: range, block_size: int
) -> Places:
    """The places of ``tokens``, by blocks as in :func:`gather_rows`; ``to_device`` carries numbers to int64 there."""
    import torch

    _require_blocks(block_ids, tokens.stop, block_size)
    first = tokens.start // block_size
    blocks = to_device(block_ids[first : -(-tokens.stop // block_size)])
    skip = tokens.start - first * block_size
    at = torch.arange(skip, skip + len(tokens), device=blocks.device)
    return Places(blocks[at // block_size], at % block_size)


def gather_into(rows: Tensor, layers: Sequence[Layer], packing: Packing, places: Places, interleave_dims: int) -> None:
    """Fill ``rows``, ``[num_layers, 2, num_tokens, H, D]`` of ``row_dtype``, as :func:`gather_rows` does.

    A few operations for each layer on the caches' device; nothing waits for it. Packing ``amx`` copies whole caches.
    """
    for layer, out in zip(layers, rows, strict=True):
        k, v = unpack(layer.cache, packing)
        for source, place in (*_k_parts(k, out[0], interleave_dims), (v, out[1])):
            _take(source, places, place)
        _scale(out, layer)


def _require_blocks(block_ids: Sequence[int], end: int, block_size: int) -> None:
    last = -(-end // block_size)
    if len(block_ids) < last:
        raise ValueError(f"token {end - 1} lies in block {last - 1}, but the request has {len(block_ids)} blocks")


def _scale(rows: Tensor, layer: Layer) -> None:
    """Undo fp8's scales: one multiplication in f32, rounded to bf16."""
    for plane, scale in zip(rows, (layer.k_scale, layer.v_scale), strict=True):
        if scale != 1.0:
            plane.mul_(scale)


def _k_parts(k: Tensor, rows: Tensor, interleave_dims: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of K and of where it goes: the rotary elements of each head in pairs, and the others."""
    if interleave_dims:
        pairs = (interleave_dims // 2, 2)
        half = k[..., :interleave_dims].unflatten(-1, pairs[::-1]).transpose(-1, -2)
        yield half, rows[..., :interleave_dims].unflatten(-1, pairs)
    if interleave_dims < k.shape[-1]:
        yield k[..., interleave_dims:], rows[..., interleave_dims:]


def _take(source: Tensor, places: Places, rows: Tensor) -> None:
    """Copy the tokens at ``places`` of ``source``, ``[B, N, ...]``, to ``rows``, ``[num_tokens, ...]``."""
    import torch

    if source.dtype == rows.dtype:
        torch.ops.aten.index.Tensor_out(source, list(places), out=rows)
    else:
        # Few operations know fp8.
        rows.copy_(source.view(torch.uint8)[places.block_ids, places.offsets].view(source.dtype))


def _copy_tokens(pages: Tensor, rows: Tensor, skip: int) -> None:
    """Copy ``pages`` ``[blocks, N, ...]`` from token ``skip`` on to ``rows`` ``[num_tokens, ...]``.

    The partial first and last blocks go apart, so that the whole blocks between them are one copy.
    """
    blocks, block_size = pages.shape[:2]
    num_tokens = rows.shape[0]
    head = min(num_tokens, block_size - skip) if skip else 0
    if head:
        rows[:head].copy_(pages[0, skip : skip + head])
    at = 1 if head else 0
    whole = (num_tokens - head) // block_size
    tail = head + whole * block_size
    if whole:
        rows[head:tail].unflatten(0, (whole, block_size)).copy_(pages[at : at + whole])
    if tail < num_tokens:
        rows[tail:].copy_(pages[blocks - 1, : num_tokens - tail])
