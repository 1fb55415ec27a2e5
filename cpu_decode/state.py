"""A chunk of KV as llama.cpp's sequence state, laid out once and filled in place.

Format: ``llama_context::state_seq_write_data`` and ``llama_kv_cache::state_write`` in llama.cpp's ``src``, for
unified, non-transposed (flash attention) caches: u32 magic, i32 sequence; then for each cache u32 streams, u32 cells;
per cell i32 position, u32 count, i32 sequence; u32 transposed, u32 layers; per layer i32 type, u64 row bytes, the K
rows; the same for V. Layers with a sliding window have a cache of their own behind the others'
(``llama_kv_cache_iswa``), which keeps every position here: our contexts are made with ``swa_full``.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from transfer.errors import ConfigError
from transfer.geometry import KVGeometry
from transfer.layout import CELL_ROWS, ROTATED_ELEMENTS, CellType, Elements

MAGIC = 0xAF143CD8

HEAD = struct.Struct("<Ii")
CELLS = struct.Struct("<II")
SHAPE = struct.Struct("<II")
PLANE = struct.Struct("<iQ")
CELL = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])


def row_bytes(geometry: KVGeometry, cell_type: CellType) -> tuple[int, int]:
    """Size of one token's K row and of its V row in one layer.

    Raises :class:`ConfigError` if heads do not fit quantized cells: llama.cpp rotates in parts of 64 elements or not at
    all (``transfer/rows.py``).
    """
    head_dims = geometry.head_dim_k, geometry.head_dim_v
    if is_quantized(cell_type) and any(head_dim % ROTATED_ELEMENTS for head_dim in head_dims):
        raise ConfigError(
            f"cells of type {cell_type} need heads of multiples of {ROTATED_ELEMENTS} elements, this model has "
            f"{head_dims[0]} in K and {head_dims[1]} in V; set [decode] cell_type to f16 or bf16"
        )
    k, v = (
        geometry.num_kv_heads * head_dim // row.block_elements * row.block_bytes
        for head_dim, row in zip(head_dims, CELL_ROWS[cell_type], strict=True)
    )
    return k, v


def is_quantized(cell_type: CellType) -> bool:
    """Whether cells of ``cell_type`` hold blocks of codes."""
    return CELL_ROWS[cell_type][0].block_elements > 1


def state_bytes(geometry: KVGeometry, num_tokens: int, cell_type: CellType) -> int:
    """Size of the state of ``num_tokens`` tokens; raises what :func:`row_bytes` raises."""
    caches = len(layers_by_cache(geometry))
    fixed = HEAD.size + caches * (CELLS.size + SHAPE.size) + 2 * geometry.num_layers * PLANE.size
    per_token = caches * CELL.itemsize + geometry.num_layers * sum(row_bytes(geometry, cell_type))
    return fixed + num_tokens * per_token


def layers_by_cache(geometry: KVGeometry) -> list[list[int]]:
    """The layers that each of llama.cpp's caches holds, in the order of the caches."""
    full = [layer for layer in range(geometry.num_layers) if layer not in geometry.window_layers]
    return [full, list(geometry.window_layers)] if geometry.window_layers else [full]


class StateBlob(NamedTuple):
    """The state of ``num_tokens`` tokens from ``start_token`` on: the first ``num_bytes`` of ``buffer``, uint8."""

    buffer: npt.NDArray[np.uint8]
    num_bytes: int
    start_token: int
    num_tokens: int


def cut(blob: StateBlob, tokens: range) -> StateBlob:
    """The state of the positions ``tokens`` alone, some of those in ``blob``, whose rows may be in any order."""
    buffer, at = blob.buffer, HEAD.size
    parts = [buffer[:at]]
    while at < blob.num_bytes:
        _, num_cells = CELLS.unpack_from(buffer.data, at)
        at += CELLS.size
        cells = buffer[at : at + num_cells * CELL.itemsize].view(CELL)
        rows = np.flatnonzero((cells["position"] >= tokens.start) & (cells["position"] < tokens.stop))
        parts += [np.frombuffer(CELLS.pack(1, rows.size), np.uint8), cells[rows].view(np.uint8)]
        at += cells.nbytes
        _, num_layers = SHAPE.unpack_from(buffer.data, at)
        parts.append(buffer[at : at + SHAPE.size])
        at += SHAPE.size
        for _ in range(2 * num_layers):
            _, size_bytes = PLANE.unpack_from(buffer.data, at)
            first = at + PLANE.size
            end = first + num_cells * size_bytes
            parts += [buffer[at:first], buffer[first:end].reshape(num_cells, size_bytes)[rows].reshape(-1)]
            at = end
    part = np.concatenate(parts)
    return StateBlob(part, part.size, tokens.start, len(tokens))


class ChunkState:
    """State of the tokens ``[start_token, start_token + num_tokens)`` in ``buffer``, uint8, at least ``state_bytes``.

    Everything but the rows is written here; :meth:`planes` are where the rows go.
    """

    def __init__(
        self,
        buffer: npt.NDArray[np.uint8],
        geometry: KVGeometry,
        cell_type: CellType,
        start_token: int,
        num_tokens: int,
    ) -> None:
        self.buffer = buffer
        self.start_token = start_token
        self.num_tokens = num_tokens
        self.num_bytes = state_bytes(geometry, num_tokens, cell_type)
        self._planes: dict[int, list[Elements]] = {layer: [] for layer in range(geometry.num_layers)}
        cells = np.zeros(num_tokens, CELL)
        cells["position"] = np.arange(start_token, start_token + num_tokens)
        cells["sequences"] = 1
        rows = list(zip(CELL_ROWS[cell_type], row_bytes(geometry, cell_type), strict=True))
        HEAD.pack_into(buffer.data, 0, MAGIC, 0)
        at = HEAD.size
        for layers in layers_by_cache(geometry):
            CELLS.pack_into(buffer.data, at, 1, num_tokens)
            at += CELLS.size
            buffer[at : at + cells.nbytes] = cells.view(np.uint8)
            at += cells.nbytes
            SHAPE.pack_into(buffer.data, at, 0, len(layers))
            at += SHAPE.size
            for row, size_bytes in rows:
                for layer in layers:
                    PLANE.pack_into(buffer.data, at, row.ggml_type, size_bytes)
                    at += PLANE.size
                    self._planes[layer].append(buffer[at : at + num_tokens * size_bytes].view(np.uint16))
                    at += num_tokens * size_bytes

    def planes(self, first_layer: int, num_layers: int) -> list[Elements]:
        """The rows of a layer group in wire order, K then V of each layer: uint16 arrays into the buffer."""
        return [plane for layer in range(first_layer, first_layer + num_layers) for plane in self._planes[layer]]
