"""What two engines must agree on before a key or value may travel between them."""

from __future__ import annotations

import hashlib

import msgspec

from transfer.errors import GeometryError


class KVGeometry(msgspec.Struct, frozen=True, kw_only=True):
    """Shape and meaning of one model's KV cache.

    Both engines derive it on their own: the prefill node from the Hugging Face directory, the decode node from the
    GGUF. ``model_fingerprint`` ties it to one set of weights: see :func:`fingerprint_norm`. ``window_layers``, by
    index, attend to the last ``sliding_window`` positions only and rotate with a theta of their own.
    """

    model_fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    rope_dims: int
    rope_theta: float
    rope_scaling: str
    sliding_window: int
    vocab_size: int
    window_layers: tuple[int, ...] = ()
    window_rope_theta: float = 0.0

    @property
    def elements_per_token(self) -> int:
        """K and V elements that one token takes in all layers."""
        return self.num_layers * self.num_kv_heads * (self.head_dim_k + self.head_dim_v)


# Of a model whose KV cannot go from one engine to the other.
NO_KV = KVGeometry(
    model_fingerprint="",
    num_layers=0,
    num_kv_heads=0,
    head_dim_k=0,
    head_dim_v=0,
    rope_dims=0,
    rope_theta=0.0,
    rope_scaling="none",
    sliding_window=0,
    vocab_size=0,
)


def fingerprint_norm(norm_weight_bf16: bytes) -> str:
    """Identify a set of weights by its final norm vector.

    Quantized GGUF files keep norms in fp32, converted from bf16 without loss, so the vector's bf16 bytes
    (``[hidden_size]``, little endian) are equal on both sides however the matrices were quantized.
    """
    return hashlib.blake2b(norm_weight_bf16, digest_size=8).hexdigest()


def require_same(ours: KVGeometry, theirs: KVGeometry) -> None:
    """Raise :class:`GeometryError` naming the first field in which the two differ.

    Thetas are compared with a relative tolerance of 1e-6: GGUF stores them as fp32.
    """
    for name in KVGeometry.__struct_fields__:
        left, right = getattr(ours, name), getattr(theirs, name)
        same = abs(left - right) <= 1e-6 * abs(left) if name.endswith("rope_theta") else left == right
        if not same:
            raise GeometryError(name, left, right)
