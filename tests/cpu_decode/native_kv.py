"""llama.cpp's own KV as wire elements, so that the decode room can be tested without vLLM."""

from __future__ import annotations

import numpy as np

from cpu_decode.llama import Batch, Context
from cpu_decode.state import ChunkState, row_bytes, state_bytes
from transfer.geometry import KVGeometry
from transfer.layout import CellType, Elements


def prefill(context: Context, seq_id: int, prompt: list[int]) -> np.ndarray:
    """Prefill ``prompt`` in one batch and return the last logits."""
    batch = Batch(len(prompt))
    row = batch.add(seq_id, 0, prompt, want_logits=True)
    context.decode(batch)
    return context.logits(row)


def elements_of(state: np.ndarray, geometry: KVGeometry, num_tokens: int, cell_type: CellType = "bf16") -> Elements:
    """The rows in a sequence state, their bytes as uint16 ``[num_layers, K rows then V rows]``."""
    assert len(state) == state_bytes(geometry, num_tokens, cell_type)
    at = 16 + 12 * num_tokens + 8
    planes = []
    for size_bytes in row_bytes(geometry, cell_type):
        size = num_tokens * size_bytes
        rows = []
        for _ in range(geometry.num_layers):
            rows.append(np.frombuffer(state, np.uint16, size // 2, at + 12))
            at += 12 + size
        planes.append(np.stack(rows))
    assert at == len(state)
    return np.ascontiguousarray(np.concatenate(planes, axis=1))


def chunk_of(
    geometry: KVGeometry, elements: Elements, start: int, end: int, cell_type: CellType = "bf16"
) -> ChunkState:
    """Tokens ``[start, end)`` of ``elements`` (all tokens) as state."""
    count = end - start
    chunk = ChunkState(np.zeros(state_bytes(geometry, count, cell_type), np.uint8), geometry, cell_type, start, count)
    k_row, v_row = (size_bytes // 2 for size_bytes in row_bytes(geometry, cell_type))
    tokens = elements.shape[1] // (k_row + v_row)
    for layer in range(geometry.num_layers):
        k_plane, v_plane = chunk.planes(layer, 1)
        k_plane[:] = elements[layer, start * k_row : end * k_row]
        v_plane[:] = elements[layer, tokens * k_row + start * v_row : tokens * k_row + end * v_row]
    return chunk
