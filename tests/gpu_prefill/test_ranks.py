"""Every head of every layer is exported by exactly one of vLLM's ranks."""

from __future__ import annotations

import msgspec
import pytest

from gpu_prefill.ranks import share_of
from tests.transfer.kv_plane import GEOMETRY
from transfer.errors import EngineError
from transfer.geometry import KVGeometry
from transfer.shares import Share, require_within, whole

LAYERS = range(GEOMETRY.num_layers)


def of_heads(count: int) -> KVGeometry:
    return msgspec.structs.replace(GEOMETRY, num_kv_heads=count)


def shares(geometry: KVGeometry, tp_size: int) -> list[Share | None]:
    return [share_of(geometry, LAYERS, tp_rank=rank, tp_size=tp_size, pp_size=1) for rank in range(tp_size)]


def test_one_rank_has_everything() -> None:
    assert shares(GEOMETRY, 1) == [whole(GEOMETRY)]


@pytest.mark.parametrize(
    ("heads", "ranks", "first_heads"),
    [(8, 2, [0, 4]), (8, 8, list(range(8))), (2, 4, [0, None, 1, None]), (1, 4, [0, None, None, None])],
)
def test_each_head_has_one_rank_that_exports_it(heads: int, ranks: int, first_heads: list[int | None]) -> None:
    geometry = of_heads(heads)
    found = shares(geometry, ranks)
    assert [share and share.first_kv_head for share in found] == first_heads
    held = [share for share in found if share is not None]
    for share in held:
        require_within(share, geometry)
    assert sum(share.size for share in held) == whole(geometry).size
    assert not any(a.overlaps(b) for a in held for b in held if a is not b)


@pytest.mark.parametrize(("heads", "ranks"), [(3, 2), (2, 3), (6, 4)])
def test_heads_that_do_not_divide_are_refused(heads: int, ranks: int) -> None:
    with pytest.raises(EngineError, match=f"{heads} KV heads cannot be spread over {ranks}"):
        shares(of_heads(heads), ranks)


@pytest.mark.parametrize(
    ("layers", "pp_size", "complaint"),
    [([0, 1], 1, "caches for 2 layers, the model's config says 3"), ([0, 2], 2, "do not follow each other")],
)
def test_layers_that_are_missing_are_refused(layers: list[int], pp_size: int, complaint: str) -> None:
    with pytest.raises(EngineError, match=complaint):
        share_of(GEOMETRY, layers, tp_rank=0, tp_size=1, pp_size=pp_size)
