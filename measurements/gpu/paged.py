"""Paged caches as vLLM lays them out on a GPU, and what exporting from them must give, by plain indexing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpu_prefill.extract import Layer
from transfer.geometry import KVGeometry
from transfer.layout import Elements, interleaved_index

# Physical orders of vLLM's caches: `LBNHC` and `LBHNC`.
Layout = Literal["NHD", "HND"]
LAYOUTS: tuple[Layout, ...] = ("NHD", "HND")
Bits = npt.NDArray[np.uint16]
# Codecs ask for heads and their sizes only.
GEOMETRY = KVGeometry(
    model_fingerprint="none",
    num_layers=1,
    num_kv_heads=1,
    head_dim_k=64,
    head_dim_v=64,
    rope_dims=64,
    rope_theta=10_000.0,
    rope_scaling="none",
    sliding_window=0,
    vocab_size=1,
)


def caches_of(bits: Bits, layout: Layout, dtype: Any, device: str) -> list[Layer]:
    """Caches ``[B, H, N, 2 * D]`` of ``dtype``, one a layer, that hold ``bits`` ``[layers, 2, B, N, H, D]``."""
    import torch

    kv = torch.from_numpy(bits.view(np.int16)).to(device).view(dtype)
    pages = torch.cat([kv[:, 0], kv[:, 1]], dim=-1).transpose(2, 3)
    return [Layer(cache) for cache in (pages if layout == "NHD" else pages.contiguous())]


def exported(bits: Bits, block_ids: Sequence[int], start: int, end: int, rope_dims: int) -> Elements:
    """What :func:`gpu_prefill.extract.gather` must return for these caches."""
    layers, _, _, _, heads, dim = bits.shape
    rows = bits[:, :, list(block_ids)].reshape(layers, 2, -1, heads, dim)[:, :, start:end].copy()
    rows[:, 0] = rows[:, 0][..., interleaved_index(dim, rope_dims)]
    return rows.reshape(layers, -1)


def times_ns(device: str, work: Callable[[], Any], rounds: int) -> list[int]:
    """How long the device worked on each of ``rounds`` calls, after one that is not counted."""
    import torch

    times = []
    for _ in range(rounds + 1):
        if device == "cpu":
            began_ns = time.monotonic_ns()
            work()
            times.append(time.monotonic_ns() - began_ns)
            continue
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        times.append(int(began.elapsed_time(ended) * 1e6))
    return times[1:]
