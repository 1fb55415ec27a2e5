"""How a vLLM attention backend stores K and V in one layer's paged cache.

vLLM registers each layer as ``[B, H, N, 2 * D]``: blocks, KV heads, tokens a block, then K and V. On CUDA that is what
the strides say. On a CPU it is only the right size: each (block, head) page is a K half and a V half, and the attention
kernels pack the halves by instruction set (``csrc/cpu/cpu_attn_*.hpp`` in vLLM):

=======  ============================  ============================
packing  K half                        V half
=======  ============================  ============================
vec      ``[D][N]``                    ``[N][D]``
amx      ``[N / 16][D / 2][16][2]``    ``[D / 16][N / 2][16][2]``
=======  ============================  ============================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Packing = Literal["strided", "vec", "amx"]


def unpack(pages: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """K and V of selected pages, each logically ``[blocks, N, H, D]``.

    ``pages`` is ``[blocks, H, N, 2 * D]`` of bf16 or f16, contiguous unless ``packing`` is ``strided``. The results
    are views for ``strided`` and ``vec``, copies for ``amx``.
    """
    blocks, heads, block_size, width = pages.shape
    dim = width // 2
    if packing == "strided":
        tokens = pages.transpose(1, 2)
        return tokens[..., :dim], tokens[..., dim:]
    halves = pages.view(blocks, heads, 2, block_size * dim)
    k, v = halves[:, :, 0], halves[:, :, 1]
    if packing == "vec":
        return (
            k.view(blocks, heads, dim, block_size).permute(0, 3, 1, 2),
            v.view(blocks, heads, block_size, dim).transpose(1, 2),
        )
    return (
        k.view(blocks, heads, block_size // 16, dim // 2, 16, 2)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(blocks, block_size, heads, dim),
        v.view(blocks, heads, dim // 16, block_size // 2, 16, 2)
        .permute(0, 3, 5, 1, 2, 4)
        .reshape(blocks, block_size, heads, dim),
    )
