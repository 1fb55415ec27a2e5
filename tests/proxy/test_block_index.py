"""How much of a prompt a worker holds, as the proxy reckons from what the worker's index says."""

from __future__ import annotations

import msgspec
import pytest

from proxy.block_index import BlockIndex, Held, held
from tests.transfer.test_blocks import GEOMETRY
from transfer import blocks
from transfer.messages import IndexUpdate, Landing, Welcome

SEED = b"seed of the pool"
PROMPT = list(range(200))
WELCOME = Welcome(
    worker="w",
    geometry=GEOMETRY,
    landing=Landing(cell_type="bf16", rope_order="half"),
    codecs=("raw",),
    kv_endpoint="tcp://127.0.0.1:1",
    num_cells=1000,
    max_sequences=4,
    pool_seed=SEED,
)


def keys(prompt: list[int] = PROMPT, fidelity: str = "", tenant: str = "") -> list[bytes]:
    return [name[:8] for name in blocks.names(blocks.root(SEED, fidelity, tenant), prompt, 64)]


def index_of(**added: list[bytes]) -> BlockIndex:
    index = BlockIndex()
    index.take(IndexUpdate(base_version=0, version=3, added=added))
    return index


def test_full_blocks_from_the_beginning_count():
    first, second, third = keys()
    assert held(PROMPT, "", "", WELCOME, index_of(ram=[first, second, third])) == Held(192, "ram")
    assert held(PROMPT[:192], "", "", WELCOME, index_of(ram=[first, second, third])) == Held(128, "ram")
    assert held(PROMPT, "", "", WELCOME, index_of(ram=[first, third])) == Held(64, "ram")
    assert held(PROMPT, "", "", WELCOME, index_of(ram=[second, third])) == Held()
    assert held([], "", "", WELCOME, index_of(ram=[first])) == Held()


def test_the_slowest_tier_that_is_needed_is_named():
    first, second, third = keys()
    assert held(PROMPT, "", "", WELCOME, index_of(cells=[first], disk=[second], ram=[third])) == Held(192, "disk")
    assert held(PROMPT, "", "", WELCOME, index_of(cells=[first], tape=[second])) == Held(64, "cells")


def test_tenants_and_fidelities_are_told_apart():
    first, _, _ = keys()
    lossy = keys(fidelity="q8")
    index = index_of(ram=[first, lossy[1]])
    assert held(PROMPT, "they", "", WELCOME, index) == Held()
    assert held(PROMPT, "", "", WELCOME, index) == Held(64, "ram")
    assert held(PROMPT, "", "q8", WELCOME, index) == Held(128, "ram")
    assert held(PROMPT, "", "kvz1", WELCOME, index) == Held(64, "ram")


def test_what_another_worker_has_put_on_the_shared_server_counts():
    first, second, third = keys()
    mine, other = index_of(ram=[first]), index_of(shared=[second], ram=[third])
    assert held(PROMPT, "", "", WELCOME, mine, [other]) == Held(128, "shared")


@pytest.mark.parametrize("welcome", [None, msgspec.structs.replace(WELCOME, pool_seed=b"")])
def test_nothing_is_known_of_a_worker_that_says_nothing(welcome):
    assert held(PROMPT, "", "", welcome, index_of(ram=keys())) == Held()
