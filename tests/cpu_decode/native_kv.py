"""llama.cpp's own KV as wire elements, so that the decode room can be tested without vLLM."""

from __future__ import annotations

import numpy as np

from cpu_decode.llama import Batch, Context
from cpu_decode.state import state_bytes
from transfer.geometry import KVGeometry
from transfer.layout import Elements


def prefill(context: Context, seq_id: int, prompt: list[int]) -> np.ndarray:
    """Prefill ``prompt`` in one batch and return the last logits."""
    batch = Batch(len(prompt))
    row = batch.add(seq_id, 0, prompt, want_logits=True)
    context.decode(batch)
    return context.logits(row)


def elements_of(state: bytes, geometry: KVGeometry, num_tokens: int) -> Elements:
    """The rows in a sequence state, uint16 ``[num_layers, K rows then V rows]``."""
    assert len(state) == state_bytes(geometry, num_tokens)
    at = 16 + 12 * num_tokens + 8
    planes = []
    for head_dim in (geometry.head_dim_k, geometry.head_dim_v):
        size = 2 * num_tokens * geometry.num_kv_heads * head_dim
        rows = []
        for _ in range(geometry.num_layers):
            rows.append(np.frombuffer(state, np.uint16, size // 2, at + 12))
            at += 12 + size
        planes.append(np.stack(rows))
    assert at == len(state)
    return np.ascontiguousarray(np.concatenate(planes, axis=1))
