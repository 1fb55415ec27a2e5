"""The KV that ``isthmus measure link`` moves: made up, in the shape of Llama-3.1-8B."""

from __future__ import annotations

import numpy as np

from transfer.geometry import KVGeometry
from transfer.layout import Elements, frame_elements, layers_per_frame

# Llama-3.1-8B: 128 KiB of 16-bit KV a token. The values are synthetic, so entropy-coded sizes and speeds are not real.
GEOMETRY = KVGeometry(
    model_fingerprint="synthetic",
    num_layers=32,
    num_kv_heads=8,
    head_dim_k=128,
    head_dim_v=128,
    rope_dims=128,
    rope_theta=500000.0,
    rope_scaling="factors",
    sliding_window=0,
    vocab_size=128256,
)
TOKEN_BYTES = 2 * GEOMETRY.elements_per_token
# A prompt repeats the blocks of its first tokens: more than a processor's caches hold.
DISTINCT_TOKENS = 2048

Chunk = tuple[range, Elements]


def blocks(num_tokens: int) -> Elements:
    """Normally distributed bf16 KV, uint16 ``[num_layers, elements of one layer]``."""
    values = np.random.default_rng(0).standard_normal(frame_elements(GEOMETRY, num_tokens, 1)).astype(np.float32)
    layer = (values.view(np.uint32) >> 16).astype(np.uint16)
    return np.ascontiguousarray(np.broadcast_to(layer, (GEOMETRY.num_layers, layer.size)))


def chunks(num_tokens: int, chunk_tokens: int) -> list[Chunk]:
    """A prompt in chunks, each with its blocks; after ``DISTINCT_TOKENS`` the same memory comes again."""
    ranges = [range(start, min(start + chunk_tokens, num_tokens)) for start in range(0, num_tokens, chunk_tokens)]
    distinct = [blocks(chunk_tokens) for _ in ranges[: max(1, DISTINCT_TOKENS // chunk_tokens)]]
    return [
        (tokens, whole if len(tokens) == chunk_tokens else blocks(len(tokens)))
        for tokens, whole in zip(ranges, distinct * (len(ranges) // len(distinct) + 1), strict=False)
    ]


def frames(parts: list[Chunk], frame_bytes: int) -> list[Elements]:
    """The elements of every frame that the plane makes of a prompt handed over chunk by chunk."""
    return [
        elements[first : first + group]
        for tokens, elements in parts
        for group in (layers_per_frame(GEOMETRY, len(tokens), frame_bytes),)
        for first in range(0, GEOMETRY.num_layers, group)
    ]
