"""Codecs on the device that holds the caches: rows become the very bytes that ``transfer/codecs.py`` would send.

A handful of torch operations for a group of layers, whatever its length; nothing waits for the device. Every operation
is one IEEE operation of the codec's definition, in its order, so the bytes are equal and not just close.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from transfer.kernels import BLOCK
from transfer.layout import CELL_ROWS, F16, Q8_0, ROTATED_ELEMENTS, CellType
from transfer.rows import rotation_elements

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Behind the payload: an int16, not 0 if the codec refuses what the rows hold.
VERDICT_BYTES = 2

# Sizes of blocks, and whether scales lie beside their codes, by codec.
_CELLS: dict[str, CellType] = {
    "raw": "f16",
    "q8": "q8_0",
    "k8v4": "k8v4",
    "rows_q8_0": "q8_0",
    "rows_k8v4": "k8v4",
    "rows_q4_0": "q4_0",
}


def encodes(codec: str, head_dim: int, num_heads: int) -> bool:
    """Whether planes of ``num_heads``, of all tokens together, are encoded here by ``codec``; others need a host."""
    if codec == "raw":
        return True
    divisor, size = (ROTATED_ELEMENTS, head_dim) if codec.startswith("rows_") else (BLOCK, head_dim * num_heads)
    return codec in _CELLS and size % divisor == 0


def payload_bytes(codec: str, plane_elements: int, num_layers: int) -> int:
    """Size of the payload of ``num_layers`` layers with planes of ``plane_elements``, K and V alike."""
    rows = CELL_ROWS[_CELLS[codec]]
    return num_layers * sum(plane_elements // row.block_elements * row.block_bytes for row in rows)


def rows_for(codec: str, out: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Where rows of ``shape`` and ``dtype`` are to be put before :func:`encode`: those of ``raw`` are the payload."""
    import torch

    if codec == "raw":
        return out[:-VERDICT_BYTES].view(dtype).view(shape)
    return torch.empty(shape, dtype=dtype, device=out.device)


def encode(codec: str, rows: Tensor, out: Tensor) -> None:
    """Write the payload of ``rows`` and the verdict on them into ``out``; ordered after what the stream has queued.

    ``rows`` is ``[num_layers, 2, num_tokens, H, D]`` of any float type, K permuted already; ``out`` uint8, contiguous,
    of :func:`payload_bytes` and ``VERDICT_BYTES``, on the same device. ``raw`` takes 16-bit rows only, which may lie in
    ``out`` already. Raises :class:`KeyError` for codecs that are not made here: see :func:`encodes`.
    """
    import torch

    cells = CELL_ROWS[_CELLS[codec]]
    payload, verdict = out[:-VERDICT_BYTES], out[-VERDICT_BYTES:].view(torch.int16)
    verdict.zero_()
    if cells[0] == F16:
        if payload.data_ptr() != rows.data_ptr():
            payload.view(rows.dtype).copy_(rows.reshape(-1))
        return
    if codec == "q8":
        planes = [(rows, payload.view(1, -1), Q8_0, 0)]
    else:
        layers = payload.view(rows.shape[0], -1)
        plane_elements = rows[0, 0].numel()
        k_bytes = plane_elements // BLOCK * cells[0].block_bytes
        rotations = (rotation_elements(rows.shape[-1]), ROTATED_ELEMENTS) if codec.startswith("rows_") else (0, 0)
        planes = [
            (rows[:, 0], layers[:, :k_bytes], cells[0], rotations[0]),
            (rows[:, 1], layers[:, k_bytes:], cells[1], rotations[1]),
        ]
    for plane, place, row, rotation in planes:
        values = plane.reshape(len(place), -1, BLOCK).float()
        if rotation:
            values = _rotated(values, rotation)
        scales, codes = (_q8 if row == Q8_0 else _q4)(values)
        # An infinity or a NaN in the rows gives an infinite scale or none; so does what no f16 scale can span.
        verdict.logical_or_(scales.isfinite().logical_not_().any())
        if rotation:
            blocks = place.unflatten(1, (-1, row.block_bytes))
            blocks[..., :2].view(torch.float16).copy_(scales.unsqueeze(-1))
            blocks[..., 2:].copy_(codes)
        else:
            scale_bytes = 2 * scales.shape[1]
            place[:, :scale_bytes].view(torch.float16).copy_(scales)
            place[:, scale_bytes:].copy_(codes.flatten(1))


def _q8(values: Tensor) -> tuple[Tensor, Tensor]:
    """f16 scales ``[..., n]`` and int8 codes, as uint8, ``[..., n, 32]`` of f32 ``[..., n, 32]``."""
    import torch

    # A tensor: CUDA multiplies by the reciprocal of a number, and that rounds differently.
    scales = values.abs().amax(-1) / torch.full((1,), 127.0, device=values.device)
    scaled = values * _inverse(scales).unsqueeze(-1)
    # The float below a half, so that 0.49999997 does not become 1.
    codes = scaled.add_(torch.full_like(scaled, 0.5 - 2.0**-25).copysign_(scaled))
    return scales.half(), codes.to(torch.int8).view(torch.uint8)


def _q4(values: Tensor) -> tuple[Tensor, Tensor]:
    """f16 scales ``[..., n]`` and pairs of codes, uint8 ``[..., n, 16]``, of f32 ``[..., n, 32]``."""
    import torch

    # Magnitude above, place from the end below: the largest key is the first of the largest elements.
    magnitudes = values.abs().view(torch.int32).long()
    keys = magnitudes * BLOCK + torch.arange(BLOCK - 1, -1, -1, device=values.device)
    first = BLOCK - 1 - keys.amax(-1, keepdim=True) % BLOCK
    # Adding 0 makes -0 a 0: a block of zeros has a negative scale whatever their signs.
    scales = (values.gather(-1, first).squeeze(-1) + 0.0) / -8.0
    codes = (values * _inverse(scales).unsqueeze(-1)).add_(8.5).to(torch.uint8).clamp_(max=15)
    return scales.half(), codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4


def _inverse(scales: Tensor) -> Tensor:
    """One over each scale; 0 where that is infinite, for no element would survive the f16 scale."""
    inverse = scales.reciprocal()
    return inverse.masked_fill_(inverse.isinf(), 0.0)


def _rotated(values: Tensor, size: int) -> Tensor:
    """Every ``size`` elements rotated: see ``transfer/rows.py``."""
    import torch

    rotated, distance = values, size // 2
    while distance:
        left, right = rotated.reshape(-1, 2, distance).unbind(1)
        rotated = torch.stack((left + right, left - right), 1)
        distance //= 2
    return rotated.reshape(values.shape) * (1.0 / math.sqrt(size))
