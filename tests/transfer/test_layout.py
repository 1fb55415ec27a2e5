import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.golden.examples import GEOMETRY
from transfer.layout import Slab, frame_elements, interleaved_index, layers_per_frame, plane_elements

LLAMA_8B = msgspec.structs.replace(GEOMETRY, num_layers=32, num_kv_heads=8, head_dim_k=128, head_dim_v=128)
UNEVEN = msgspec.structs.replace(GEOMETRY, num_layers=5, num_kv_heads=3, head_dim_k=24, head_dim_v=16)


def test_planes_and_frames_of_a_known_model():
    assert plane_elements(LLAMA_8B, 512) == (512 * 1024, 512 * 1024)
    # 128 KiB a token at 16 bits.
    assert 2 * frame_elements(LLAMA_8B, 1, 32) == 128 << 10
    assert frame_elements(LLAMA_8B, 1, 32) == LLAMA_8B.elements_per_token


def test_a_slab_has_planes_of_k_and_v_in_turn():
    assert Slab(UNEVEN, 2, range(5, 12)).planes == (7 * 72, 7 * 48, 7 * 72, 7 * 48)


def test_k_and_v_may_differ_in_width():
    assert plane_elements(UNEVEN, 7) == (7 * 3 * 24, 7 * 3 * 16)
    assert frame_elements(UNEVEN, 7, 2) == 2 * 7 * 3 * 40


@given(num_tokens=st.integers(1, 4096), frame_bytes=st.integers(1, 1 << 26))
def test_a_frame_holds_as_many_layers_as_fit(num_tokens, frame_bytes):
    layers = layers_per_frame(UNEVEN, num_tokens, frame_bytes)
    assert 1 <= layers <= UNEVEN.num_layers
    assert layers == 1 or 2 * frame_elements(UNEVEN, num_tokens, layers) <= frame_bytes
    assert layers == UNEVEN.num_layers or 2 * frame_elements(UNEVEN, num_tokens, layers + 1) > frame_bytes


def test_interleaved_index_of_a_small_head():
    assert interleaved_index(8, 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert interleaved_index(8, 4).tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert interleaved_index(8, 0).tolist() == list(range(8))


@pytest.mark.parametrize(("head_dim", "rope_dims"), [(8, 8), (64, 64), (128, 64), (80, 20)])
def test_interleaving_follows_the_formula_and_moves_only_rotary_elements(head_dim, rope_dims):
    half = np.arange(100, 100 + head_dim)
    interleaved = half[..., interleaved_index(head_dim, rope_dims)]
    for i in range(rope_dims // 2):
        for j in range(2):
            assert interleaved[2 * i + j] == half[j * (rope_dims // 2) + i]
    assert np.array_equal(interleaved[rope_dims:], half[rope_dims:])
    assert sorted(interleaved) == sorted(half)


@pytest.mark.parametrize("rope_dims", [8, 6])
def test_rotation_and_interleaving_commute(rope_dims):
    # Rotating pairs (i, i + half) and then interleaving is interleaving and then rotating neighbours.
    head = np.random.default_rng(0).standard_normal(8)
    angles = np.arange(1, rope_dims // 2 + 1) * 0.3
    index = interleaved_index(8, rope_dims)

    def rotate(x, first, second):
        out = x.copy()
        out[first] = x[first] * np.cos(angles) - x[second] * np.sin(angles)
        out[second] = x[first] * np.sin(angles) + x[second] * np.cos(angles)
        return out

    pairs = np.arange(rope_dims // 2)
    rotated_first = rotate(head, pairs, pairs + rope_dims // 2)[index]
    interleaved_first = rotate(head[index], 2 * pairs, 2 * pairs + 1)
    np.testing.assert_array_equal(rotated_first, interleaved_first)
