"""Names of blocks: equal for equal beginnings in equal circumstances, and for nothing else."""

from __future__ import annotations

from itertools import islice

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer import blocks
from transfer.geometry import KVGeometry

GEOMETRY = KVGeometry(
    model_fingerprint="0123456789abcdef",
    num_layers=4,
    num_kv_heads=2,
    head_dim_k=8,
    head_dim_v=8,
    rope_dims=8,
    rope_theta=10000.0,
    rope_scaling="none",
    sliding_window=0,
    vocab_size=256,
)
ROOT = blocks.root(bytes(16), "", "")
tokens = st.lists(st.integers(0, 2), max_size=30)


def seed_of(geometry: KVGeometry = GEOMETRY, cell_type="bf16", order="half", weights="w", engine="1") -> bytes:
    return blocks.pool_seed(geometry, cell_type, order, weights, engine)


@given(tokens, tokens)
def test_names_are_equal_as_far_as_the_tokens_are(ours, theirs):
    mine, yours = (list(blocks.names(ROOT, each, 4)) for each in (ours, theirs))
    assert len(mine) == len(ours) // 4
    for at, (a, b) in enumerate(zip(mine, yours, strict=False)):
        end = 4 * (at + 1)
        assert (a == b) == (ours[:end] == theirs[:end])
    assert len(set(mine)) == len(mine)


def test_a_name_is_made_when_it_is_asked_for():
    # The second block would raise: it is not a token.
    assert len(list(islice(blocks.names(ROOT, [1, 2, 3, 4, -1, 2, 3, 4], 4), 1))) == 1


def test_nothing_foreign_has_the_same_name():
    seeds = [
        seed_of(),
        seed_of(msgspec.structs.replace(GEOMETRY, rope_theta=500000.0)),
        seed_of(msgspec.structs.replace(GEOMETRY, rope_scaling="linear:2")),
        seed_of(msgspec.structs.replace(GEOMETRY, model_fingerprint="f" * 16)),
        seed_of(cell_type="q8_0"),
        seed_of(order="interleaved"),
        seed_of(weights="x"),
        seed_of(engine="2"),
    ]
    roots = [blocks.root(seed, "", "") for seed in seeds]
    roots += [blocks.root(seeds[0], "q8", ""), blocks.root(seeds[0], "", "q8"), blocks.root(seeds[0], "q", "8")]
    names = {name for root in roots for name in blocks.names(root, list(range(64)), 64)}
    assert len(names) == len(roots)


@pytest.mark.parametrize(("window", "expected"), [(0, 64), (4096, 64), (32, 32)])
def test_blocks_fit_into_a_window(window, expected):
    assert blocks.tokens_per_block(msgspec.structs.replace(GEOMETRY, sliding_window=window)) == expected
