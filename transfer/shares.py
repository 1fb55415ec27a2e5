"""A transfer in parts: what one rank of a prefill node holds of a model's KV.

With tensor parallelism each rank holds some KV heads of every layer, with pipeline parallelism all heads of some
layers. Each sends what it holds in a session of its own, under the same ticket; SenderHello says what that is, and the
receiver puts the parts together.
"""

from __future__ import annotations

import msgspec

from transfer.errors import GeometryError
from transfer.geometry import KVGeometry


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """The heads ``first_kv_head`` and following of the layers ``first_layer`` and following."""

    first_kv_head: int
    num_kv_heads: int
    first_layer: int
    num_layers: int

    @property
    def kv_heads(self) -> range:
        """By index in the model."""
        return range(self.first_kv_head, self.first_kv_head + self.num_kv_heads)

    @property
    def layers(self) -> range:
        """By index in the model."""
        return range(self.first_layer, self.first_layer + self.num_layers)

    @property
    def size(self) -> int:
        """Pairs of a head and a layer."""
        return self.num_kv_heads * self.num_layers

    def overlaps(self, other: Share) -> bool:
        """Whether some head of some layer is in both."""
        return _meet(self.kv_heads, other.kv_heads) and _meet(self.layers, other.layers)

    def geometry(self, model: KVGeometry) -> KVGeometry:
        """The geometry of a cache that holds this and nothing else of ``model``."""
        return msgspec.structs.replace(model, num_layers=self.num_layers, num_kv_heads=self.num_kv_heads)


def whole(model: KVGeometry) -> Share:
    """All of a model's KV."""
    return Share(first_kv_head=0, num_kv_heads=model.num_kv_heads, first_layer=0, num_layers=model.num_layers)


def require_within(share: Share, model: KVGeometry) -> None:
    """Raise :class:`GeometryError` for a share that is empty or reaches out of the model."""
    for name, held, all_of in (
        ("share.kv_heads", share.kv_heads, range(model.num_kv_heads)),
        ("share.layers", share.layers, range(model.num_layers)),
    ):
        if not (held and held.start in all_of and held[-1] in all_of):
            raise GeometryError(name, all_of, held)


def _meet(left: range, right: range) -> bool:
    return left.start < right.stop and right.start < left.stop
