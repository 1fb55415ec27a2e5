"""The canonical order of KV elements on the wire, and the order of K within a head.

A frame carries ``num_tokens`` tokens of ``num_layers`` consecutive layers. Its elements are, for each layer: the K rows
``[num_tokens, num_kv_heads * head_dim_k]``, then the V rows ``[num_tokens, num_kv_heads * head_dim_v]``; token-major,
contiguous, 16 bits an element; the heads are those that its sender holds (``transfer/shares.py``). That is also the
order of rows in a llama.cpp sequence state (``llama_kv_cache::state_write_data`` in llama.cpp's
``src/llama-kv-cache.cpp``), so landing is one pass.

Within a head, rotary embedding pairs element ``i`` with ``i + half`` in Hugging Face and vLLM ("half"), but GGUF
conversion permutes the weights of NORM-rope architectures so that pairs are neighbours ("interleaved"):
``interleaved[2 * i + j] == half[j * n_rot / 2 + i]`` (``permute`` in llama.cpp's ``convert_hf_to_gguf.py``).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from transfer.geometry import KVGeometry

RopeOrder = Literal["half", "interleaved"]
CellType = Literal["f16", "bf16", "q8_0", "k8v4", "q4_0"]
Elements = npt.NDArray[np.uint16]
Bytes = npt.NDArray[np.uint8]
Payload = bytes | bytearray | memoryview


def plane_elements(geometry: KVGeometry, num_tokens: int) -> tuple[int, int]:
    """Elements of the K plane and of the V plane of one layer."""
    heads = geometry.num_kv_heads
    return num_tokens * heads * geometry.head_dim_k, num_tokens * heads * geometry.head_dim_v


class CellRow(NamedTuple):
    """How llama.cpp keeps a row of K or V: its ``ggml_type`` (``ggml/include/ggml.h``) and that type's blocks."""

    ggml_type: int
    block_elements: int
    block_bytes: int


F16, BF16 = CellRow(1, 1, 2), CellRow(30, 1, 2)
Q8_0, Q4_0 = CellRow(8, 32, 34), CellRow(2, 32, 18)
# K rows and V rows.
CELL_ROWS: dict[CellType, tuple[CellRow, CellRow]] = {
    "f16": (F16, F16),
    "bf16": (BF16, BF16),
    "q8_0": (Q8_0, Q8_0),
    "k8v4": (Q8_0, Q4_0),
    "q4_0": (Q4_0, Q4_0),
}
# Heads in quantized cells are rotated in parts of this size or larger: ``transfer/rows.py``.
ROTATED_ELEMENTS = 64


class Slab(NamedTuple):
    """What the elements of a frame are: ``num_layers`` layers of the tokens at the positions ``tokens`` of a prompt."""

    geometry: KVGeometry
    num_layers: int
    tokens: range

    @property
    def planes(self) -> tuple[int, ...]:
        """Elements of each plane, K and V in turn."""
        return plane_elements(self.geometry, len(self.tokens)) * self.num_layers


def frame_elements(geometry: KVGeometry, num_tokens: int, num_layers: int) -> int:
    """Elements of a frame."""
    return num_layers * sum(plane_elements(geometry, num_tokens))


def layers_per_frame(geometry: KVGeometry, num_tokens: int, frame_bytes: int) -> int:
    """How many layers of ``num_tokens`` tokens fit ``frame_bytes`` at 16 bits an element; at least 1."""
    return max(1, min(geometry.num_layers, frame_bytes // (2 * frame_elements(geometry, num_tokens, 1))))


def layers_together(left_layers: int, most_layers: int) -> int:
    """How many of a step's ``left_layers`` leave together: ``most_layers``, but no more than half of them.

    The last layer leaves alone then: whatever leaves with it waits for it, and the request for all of that.
    """
    return max(1, min(most_layers, left_layers // 2))


def interleaved_index(head_dim: int, rope_dims: int) -> npt.NDArray[np.int64]:
    """Index ``p`` with ``interleaved == half[..., p]`` for one head of ``head_dim``; only ``rope_dims`` are moved."""
    index = np.arange(head_dim)
    index[:rope_dims] = index[:rope_dims].reshape(2, rope_dims // 2).T.reshape(-1)
    return index
