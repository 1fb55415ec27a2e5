import struct

import msgspec
import pytest

from tests.golden.examples import GEOMETRY
from transfer.errors import GeometryError
from transfer.geometry import KVGeometry, fingerprint_norm, require_same

OTHER = {
    "model_fingerprint": "fedcba9876543210",
    "num_layers": 3,
    "num_kv_heads": 2,
    "head_dim_k": 16,
    "head_dim_v": 16,
    "rope_dims": 4,
    "rope_theta": 500000.0,
    "rope_scaling": "yarn",
    "sliding_window": 512,
    "vocab_size": 257,
    "window_layers": (0, 2),
    "window_rope_theta": 10000.0,
}


def with_field(field, value):
    return msgspec.structs.replace(GEOMETRY, **{field: value})


@pytest.mark.parametrize("field", KVGeometry.__struct_fields__)
def test_a_difference_is_refused_with_its_name_and_both_values(field):
    with pytest.raises(GeometryError) as caught:
        require_same(GEOMETRY, with_field(field, OTHER[field]))
    assert caught.value.field == field
    for text in (field, repr(getattr(GEOMETRY, field)), repr(OTHER[field])):
        assert text in str(caught.value)


def test_equal_geometries_pass():
    require_same(GEOMETRY, msgspec.structs.replace(GEOMETRY))


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.1, 1e7 / 3])
def test_rope_theta_may_have_been_stored_as_fp32(theta):
    (stored,) = struct.unpack("<f", struct.pack("<f", theta))
    require_same(with_field("rope_theta", theta), with_field("rope_theta", stored))
    require_same(with_field("rope_theta", stored), with_field("rope_theta", theta))


def test_rope_theta_that_is_not_a_number_is_refused():
    with pytest.raises(GeometryError, match="rope_theta"):
        require_same(GEOMETRY, with_field("rope_theta", float("nan")))


def test_elements_per_token_counts_k_and_v_of_all_layers():
    geometry = msgspec.structs.replace(GEOMETRY, num_layers=30, num_kv_heads=3, head_dim_k=64, head_dim_v=32)
    assert geometry.elements_per_token == 30 * 3 * 96


def test_weights_are_told_apart_by_their_norm():
    norm = bytes(range(64))
    assert fingerprint_norm(norm) == fingerprint_norm(bytes(norm))
    assert len(fingerprint_norm(norm)) == 16
    assert fingerprint_norm(norm) != fingerprint_norm(norm[:-1] + b"\0")
