"""A chunk of KV as llama.cpp's sequence state, laid out once and filled in place.

Format: ``llama_context::state_seq_write_data`` and ``llama_kv_cache::state_write`` in llama.cpp's ``src``, for one
unified, non-transposed (flash attention) cache: u32 magic, i32 sequence; u32 streams, u32 cells; per cell i32 position,
u32 count, i32 sequence; u32 transposed, u32 layers; per layer i32 type, u64 row bytes, the K rows; the same for V.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from transfer.geometry import KVGeometry
from transfer.layout import Elements, ElementType

MAGIC = 0xAF143CD8
GGML_TYPE: dict[ElementType, int] = {"f16": 1, "bf16": 30}

_HEAD = struct.Struct("<IiII")
_SHAPE = struct.Struct("<II")
_PLANE = struct.Struct("<iQ")
_CELL = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])


def state_bytes(geometry: KVGeometry, num_tokens: int) -> int:
    """Size of the state of ``num_tokens`` tokens."""
    fixed = _HEAD.size + _SHAPE.size + 2 * geometry.num_layers * _PLANE.size
    return fixed + num_tokens * (_CELL.itemsize + 2 * geometry.elements_per_token)


class ChunkState:
    """State of the tokens ``[start_token, start_token + num_tokens)`` in ``buffer``, uint8, at least ``state_bytes``.

    Everything but the rows is written here; :meth:`planes` are where the rows go.
    """

    def __init__(
        self,
        buffer: npt.NDArray[np.uint8],
        geometry: KVGeometry,
        cell_type: ElementType,
        start_token: int,
        num_tokens: int,
    ) -> None:
        self.buffer = buffer
        self.start_token = start_token
        self.num_tokens = num_tokens
        self.num_bytes = state_bytes(geometry, num_tokens)
        self._num_layers = geometry.num_layers
        cells = np.zeros(num_tokens, _CELL)
        cells["position"] = np.arange(start_token, start_token + num_tokens)
        cells["sequences"] = 1
        _HEAD.pack_into(buffer.data, 0, MAGIC, 0, 1, num_tokens)
        at = _HEAD.size
        buffer[at : at + cells.nbytes] = cells.view(np.uint8)
        at += cells.nbytes
        _SHAPE.pack_into(buffer.data, at, 0, geometry.num_layers)
        at += _SHAPE.size
        self._planes: list[Elements] = []
        for head_dim in (geometry.head_dim_k, geometry.head_dim_v):
            row_bytes = 2 * geometry.num_kv_heads * head_dim
            for _ in range(geometry.num_layers):
                _PLANE.pack_into(buffer.data, at, GGML_TYPE[cell_type], row_bytes)
                at += _PLANE.size
                self._planes.append(buffer[at : at + num_tokens * row_bytes].view(np.uint16))
                at += num_tokens * row_bytes

    def planes(self, first_layer: int, num_layers: int) -> list[Elements]:
        """The rows of a layer group in wire order: K then V of each layer, uint16 arrays into the buffer."""
        layers = range(first_layer, first_layer + num_layers)
        return [self._planes[plane] for layer in layers for plane in (layer, self._num_layers + layer)]
