"""Paged blocks to chunks: the elements of a token range of all layers, in the order of ``transfer/layout.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gpu_prefill.pages import Packing, unpack
from transfer.layout import Elements

if TYPE_CHECKING:
    from torch import Tensor


def gather(
    layers: Sequence[Tensor],
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
    layers: Sequence[Tensor],
    packing: Packing,
    block_ids: Sequence[int],
    start: int,
    end: int,
    interleave_dims: int = 0,
) -> Tensor:
    """Tokens ``[start, end)`` of one request as ``[num_layers, 2, end - start, H, D]``, on the caches' device.

    ``layers`` are the layers' caches, each ``[B, H, N, 2 * D]`` of bf16 or f16 on one device; block ``i`` of
    ``block_ids`` holds tokens ``[i * N, (i + 1) * N)``. If ``interleave_dims`` is not 0, the first so many elements of
    each head of K go from "half" to "interleaved" order. Raises :class:`ValueError` for tokens beyond the blocks.
    """
    import torch

    cache = layers[0]
    _, heads, block_size, width = cache.shape
    dim, num_tokens = width // 2, end - start
    first, last = start // block_size, -(-end // block_size)
    if len(block_ids) < last:
        raise ValueError(f"token {end - 1} lies in block {last - 1}, but the request has {len(block_ids)} blocks")
    blocks = torch.tensor(block_ids[first:last], dtype=torch.int64, device=cache.device)
    out = torch.empty((len(layers), 2, num_tokens, heads, dim), dtype=cache.dtype, device=cache.device)
    for layer, rows in zip(layers, out, strict=True):
        k, v = unpack(layer.index_select(0, blocks), packing)
        _copy_k(k, rows[0], start - first * block_size, interleave_dims)
        _copy_tokens(v, rows[1], start - first * block_size)
    return out


def _copy_k(k: Tensor, rows: Tensor, skip: int, interleave_dims: int) -> None:
    if not interleave_dims:
        _copy_tokens(k, rows, skip)
        return
    pairs = (interleave_dims // 2, 2)
    half = k[..., :interleave_dims].unflatten(-1, pairs[::-1]).transpose(-1, -2)
    _copy_tokens(half, rows[..., :interleave_dims].unflatten(-1, pairs), skip)
    if interleave_dims < k.shape[-1]:
        _copy_tokens(k[..., interleave_dims:], rows[..., interleave_dims:], skip)


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
