"""What each of vLLM's ranks exports, where several hold a model's KV between them."""

from __future__ import annotations

from collections.abc import Iterable

from transfer.errors import EngineError
from transfer.geometry import KVGeometry
from transfer.shares import Share


def share_of(geometry: KVGeometry, layers: Iterable[int], *, tp_rank: int, tp_size: int, pp_size: int) -> Share | None:
    """What the rank with caches for ``layers`` exports; None if another rank holds the same heads and exports them.

    As vLLM spreads KV heads over tensor parallel ranks: evenly, or, where they are too few, each to ranks that follow
    each other (``get_num_kv_heads`` in ``vllm/config/model.py``, ``QKVParallelLinear``). Raises :class:`EngineError`
    for layers that are missing or do not follow each other, and heads that do not divide.
    """
    held = sorted(layers)
    if pp_size == 1 and len(held) != geometry.num_layers:
        raise EngineError(f"vLLM has caches for {len(held)} layers, the model's config says {geometry.num_layers}")
    if not held or held != list(range(held[0], held[-1] + 1)):
        raise EngineError(f"vLLM's rank has caches for the layers {held}, which do not follow each other")
    copies = max(1, tp_size // geometry.num_kv_heads)
    parts = tp_size // copies
    if parts * copies != tp_size or geometry.num_kv_heads % parts:
        raise EngineError(f"{geometry.num_kv_heads} KV heads cannot be spread over {tp_size} tensor parallel ranks")
    if tp_rank % copies:
        return None
    heads = geometry.num_kv_heads // parts
    return Share(first_kv_head=tp_rank // copies * heads, num_kv_heads=heads, first_layer=held[0], num_layers=len(held))
