"""Codecs ``rows_*``: KV as the rows of llama.cpp's quantized cells, so that landing is a copy.

In quantized cells llama.cpp keeps ``quantize(H x / sqrt(n))`` of every ``n`` elements ``x`` of a head, after RoPE
(``attn_rot`` in ``src/llama-kv-cache.cpp``; H_1 = [1], H_2n = [[H_n, H_n], [H_n, -H_n]]): what is rotated has no
outliers. Queries are rotated alike, so rows that were not would give wrong tokens. Heads must be multiples of 64
elements. For V, n is 64; for K, n doubles from 64 as long as it divides the head.

In f32: for the distances n / 2, ... 4, 2, 1, every pair (a, b) at that distance becomes (a + b, a - b); then every
element is multiplied by f32(1 / sqrt(n)). Each 32 elements then become a ``block_q8_0`` (f16 scale, 32 int8 codes) or a
``block_q4_0`` (f16 scale, 16 bytes of codes) of ``ggml/src/ggml-common.h``, with scales and codes as in ``q8`` and
``k8v4`` (``transfer/codecs.py``). The payload is these blocks, plane by plane, in the order of the elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numba import boolean, float32, int32, intp, njit, uint8, uint16

from transfer.errors import CodecError
from transfer.frames import Element
from transfer.kernels import (
    BLOCK,
    BYTES_IN,
    BYTES_OUT,
    ELEMENTS_IN,
    load_bf16,
    load_f16,
    require_finite,
    round_away,
    store_f16,
)
from transfer.layout import CELL_ROWS, Q8_0, ROTATED_ELEMENTS, CellRow, CellType, Elements, Payload, Slab

CELL_TYPES: tuple[CellType, ...] = ("q8_0", "k8v4", "q4_0")


def encode(cell_type: CellType, elements: Elements, element: Element, slab: Slab) -> Payload:
    """The payload of ``elements`` for cells of ``cell_type``; see :class:`transfer.codecs.Codec`."""
    rotations = _rotations(slab)
    planes = list(_spans(cell_type, slab.planes))
    payload = np.empty(planes[-1][2].stop, np.uint8)
    for index, (row, span, blocks) in enumerate(planes):
        rotate = _rotate_q8 if row == Q8_0 else _rotate_q4
        top = rotate(elements[span], rotations[index % 2], payload[blocks], element == Element.BF16)
        require_finite(int(top), Element.F16)
    return payload.data


def decode(
    cell_type: CellType, payload: Payload, _element: Element, _cells: Element, outs: Sequence[Elements], _tokens: range
) -> None:
    """Fill ``outs``, the bytes of rows as uint16, from ``payload``; see :class:`transfer.codecs.Codec`."""
    rows = CELL_ROWS[cell_type]
    expected_bytes = sum(out.nbytes for out in outs)
    if len(payload) != expected_bytes:
        raise CodecError(f"payload has {len(payload)} bytes, its rows need {expected_bytes}")
    whole, at = np.frombuffer(payload, np.uint8), 0
    for index, out in enumerate(outs):
        block_bytes = rows[index % 2].block_bytes
        if out.nbytes % block_bytes:
            raise CodecError(f"rows of {out.nbytes} bytes are no whole blocks of {block_bytes}")
        blocks = whole[at : at + out.nbytes]
        require_finite(int(_largest_scale(blocks, block_bytes)), Element.F16)
        out.view(np.uint8)[:] = blocks
        at += out.nbytes


def rotation_elements(head_dim_k: int) -> int:
    """How many elements of a K head are rotated together."""
    size = ROTATED_ELEMENTS
    while head_dim_k % (2 * size) == 0:
        size *= 2
    return size


def _rotations(slab: Slab) -> tuple[int, int]:
    head_dims = slab.geometry.head_dim_k, slab.geometry.head_dim_v
    if any(head_dim < 1 or head_dim % ROTATED_ELEMENTS for head_dim in head_dims):
        raise CodecError(f"rows need heads of multiples of {ROTATED_ELEMENTS} elements, not of {head_dims}")
    return rotation_elements(slab.geometry.head_dim_k), ROTATED_ELEMENTS


def _spans(cell_type: CellType, planes: Sequence[int]) -> Iterator[tuple[CellRow, slice, slice]]:
    """Of each plane: its form, its elements in the frame, its blocks in the payload."""
    first = at = 0
    for index, count in enumerate(planes):
        row = CELL_ROWS[cell_type][index % 2]
        size_bytes = count // row.block_elements * row.block_bytes
        yield row, slice(first, first + count), slice(at, at + size_bytes)
        first, at = first + count, at + size_bytes


@njit(uint16(BYTES_IN, intp), nogil=True, cache=True)
def _largest_scale(blocks, block_bytes):  # type: ignore[no-untyped-def]
    top = uint16(0)
    for at in range(0, blocks.size, block_bytes):
        top = max(top, uint16(uint16(blocks[at]) | (uint16(blocks[at + 1] & uint8(0x7F)) << uint16(8))))
    return top


@njit(inline="always")
def _spread(source, out, half):  # type: ignore[no-untyped-def]
    # Pairs that lie half the size apart become neighbours: after log2(size) rounds all is back in its place, and every
    # round is the same loop, which becomes vector code.
    for i in range(half):
        a, b = source[i], source[i + half]
        out[2 * i] = a + b
        out[2 * i + 1] = a - b


@njit(inline="always")
def _rotate(source, source_is_bf16, out, spare):  # type: ignore[no-untyped-def]
    """Rotate the elements ``source`` into f32 ``out`` by way of ``spare``; returns the largest magnitude rotated."""
    size = source.size
    top = uint16(0)
    for i in range(size):
        top = max(top, uint16(source[i] & uint16(0x7FFF)))
    if source_is_bf16:
        for i in range(size):
            out[i] = load_bf16(source[i])
    else:
        for i in range(size):
            out[i] = load_f16(source[i])
    rounds = 0
    while 1 << rounds < size:
        rounds += 1
    for _ in range(rounds // 2):
        _spread(out, spare, size // 2)
        _spread(spare, out, size // 2)
    norm = float32(1 / np.sqrt(size))
    if rounds % 2:
        _spread(out, spare, size // 2)
        for i in range(size):
            out[i] = spare[i] * norm
    else:
        for i in range(size):
            out[i] = out[i] * norm
    return top


@njit(inline="always")
def _is_too_large(top, source_is_bf16):  # type: ignore[no-untyped-def]
    # From 2**60 on no f16 scale would do, and sums could become NaN, which comparisons pass over.
    return top >= (uint16(0x5D80) if source_is_bf16 else uint16(0x7C00))


@njit(inline="always")
def _store_scale(scale, block):  # type: ignore[no-untyped-def]
    half = store_f16(scale)
    block[0], block[1] = uint8(half & uint16(0xFF)), uint8(half >> uint16(8))
    return uint16(half & uint16(0x7FFF))


@njit(inline="always")
def _inverse(scale):  # type: ignore[no-untyped-def]
    inverse = float32(1.0) / scale
    # No element would survive the f16 scale.
    return float32(0.0) if abs(inverse) == float32(np.inf) else inverse


@njit(inline="always")
def _extreme(row):  # type: ignore[no-untyped-def]
    """The first element of largest magnitude; +0 if all are 0."""
    highest, lowest = float32(0.0), float32(0.0)
    for i in range(BLOCK):
        highest, lowest = max(highest, row[i]), min(lowest, row[i])
    extreme = highest if highest > -lowest else lowest
    if highest == -lowest:
        for i in range(BLOCK - 1, -1, -1):
            extreme = row[i] if abs(row[i]) == highest and highest > float32(0.0) else extreme
        extreme = extreme if highest > float32(0.0) else float32(0.0)
    return extreme


@njit(uint16(ELEMENTS_IN, intp, BYTES_OUT, boolean), nogil=True, cache=True, error_model="numpy")  # 1 / 0 is infinity
def _rotate_q8(source, size, out, source_is_bf16):  # type: ignore[no-untyped-def]
    """Write the ``block_q8_0`` of ``source``, rotated by ``size`` elements; returns the largest scale."""
    top = uint16(0)
    vectors = source.reshape(source.size // size, size)
    blocks = out.reshape(source.size // BLOCK, BLOCK + 2)
    rotated, spare = np.empty(size, np.float32), np.empty(size, np.float32)
    rows = rotated.reshape(size // BLOCK, BLOCK)
    for vector in range(vectors.shape[0]):
        source_top = _rotate(vectors[vector], source_is_bf16, rotated, spare)
        top = max(top, uint16(0x7FFF) if _is_too_large(source_top, source_is_bf16) else uint16(0))
        for index in range(rows.shape[0]):
            row, block = rows[index], blocks[vector * rows.shape[0] + index]
            amax = float32(0.0)
            for i in range(BLOCK):
                amax = max(amax, abs(row[i]))
            scale = amax / float32(127.0)
            top = max(top, _store_scale(scale, block))
            inverse = _inverse(scale)
            for i in range(BLOCK):
                block[2 + i] = uint8(round_away(row[i] * inverse))
    return top


@njit(uint16(ELEMENTS_IN, intp, BYTES_OUT, boolean), nogil=True, cache=True, error_model="numpy")  # 1 / 0 is infinity
def _rotate_q4(source, size, out, source_is_bf16):  # type: ignore[no-untyped-def]
    """Write the ``block_q4_0`` of ``source``, rotated by ``size`` elements; returns the largest scale."""
    top = uint16(0)
    vectors = source.reshape(source.size // size, size)
    blocks = out.reshape(source.size // BLOCK, BLOCK // 2 + 2)
    rotated, spare = np.empty(size, np.float32), np.empty(size, np.float32)
    rows = rotated.reshape(size // BLOCK, BLOCK)
    for vector in range(vectors.shape[0]):
        source_top = _rotate(vectors[vector], source_is_bf16, rotated, spare)
        top = max(top, uint16(0x7FFF) if _is_too_large(source_top, source_is_bf16) else uint16(0))
        for index in range(rows.shape[0]):
            row, block = rows[index], blocks[vector * rows.shape[0] + index]
            scale = _extreme(row) / float32(-8.0)
            top = max(top, _store_scale(scale, block))
            inverse = _inverse(scale)
            for i in range(BLOCK // 2):
                low = min(int32(15), int32(row[i] * inverse + float32(8.5)))
                high = min(int32(15), int32(row[i + BLOCK // 2] * inverse + float32(8.5)))
                block[2 + i] = uint8(low | (high << int32(4)))
    return top
