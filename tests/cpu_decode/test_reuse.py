"""Where a prompt's beginning comes from, and who may have whose KV."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from cpu_decode.pool.below import Fetched, LowerTiers, Piece
from cpu_decode.pool.block_log import BlockLog
from cpu_decode.prefix import LEAST_TOKENS
from cpu_decode.reuse import Plan, PrefixCache, Scope
from cpu_decode.state import StateBlob, cut
from tests.cpu_decode.native_kv import chunk_of
from tests.cpu_decode.test_landing import GEOMETRY
from transfer import blocks as block_names
from transfer.blocks import BLOCK_TOKENS
from transfer.layout import CellType
from transfer.messages import Reserve, Sampling

PROMPT = list(range(200))
EXACT = Scope()
Q8 = Scope("q8")


def cache_of(max_bytes: int = 1 << 24, window: int = 0, cell_type: CellType = "bf16") -> PrefixCache:
    return PrefixCache(msgspec.structs.replace(GEOMETRY, sliding_window=window), cell_type, max_bytes)


def keep(cache: PrefixCache, tokens: list[int], scope: Scope = EXACT) -> None:
    blocks = cache.keep(tokens, scope)
    for block in blocks:
        block.saved = True
    cache.kept(blocks)


def pieces(plan: Plan) -> list[range]:
    return [tokens for _, tokens in plan.pieces]


def test_the_last_token_of_a_prompt_is_always_computed():
    cache = cache_of()
    keep(cache, PROMPT)
    plan = cache.find(PROMPT, EXACT)
    assert (plan.num_tokens, plan.donor, plan.shared_tokens) == (199, None, 0)
    assert pieces(plan) == [range(64), range(64, 128), range(128, 192), range(192, 199)]


def test_blocks_go_on_where_lent_cells_end_and_the_longer_one_decides():
    cache = cache_of()
    keep(cache, PROMPT[:150])
    cache.lend(3, [*PROMPT[:100], 999], EXACT)
    plan = cache.find(PROMPT, EXACT)
    assert (plan.num_tokens, plan.donor, plan.shared_tokens) == (150, 3, 100)
    assert pieces(plan) == [range(100, 128), range(128, 150)]
    cache.lend(4, PROMPT, EXACT)
    assert cache.find(PROMPT, EXACT) == Plan(199, 4, 199)
    cache.take_back(4)
    cache.take_back(3)
    assert cache.find(PROMPT, EXACT).donor is None


def test_a_few_tokens_are_not_worth_it():
    cache = cache_of()
    keep(cache, PROMPT[: LEAST_TOKENS - 1])
    cache.lend(3, PROMPT[: LEAST_TOKENS - 1], EXACT)
    assert cache.find(PROMPT, EXACT) == Plan()
    keep(cache, PROMPT[:LEAST_TOKENS])
    assert cache.find(PROMPT, EXACT).num_tokens == LEAST_TOKENS


def test_without_room_nothing_is_reused():
    cache = cache_of(0)
    keep(cache, PROMPT)
    cache.lend(1, PROMPT, EXACT)
    assert cache.find(PROMPT, EXACT) == Plan()


def test_cells_that_a_window_has_left_behind_are_not_lent_and_blocks_fit_the_window():
    cache = cache_of(window=32)
    cache.lend(1, PROMPT, EXACT)
    assert cache.find(PROMPT, EXACT) == Plan()
    keep(cache, PROMPT)
    assert {len(tokens) for tokens in pieces(cache.find(PROMPT, EXACT))[:-1]} == {32}


@pytest.mark.parametrize(
    ("codec", "source", "cell_type", "fidelity"),
    [
        ("raw", "kv", "bf16", ""),
        ("lz4", "kv", "f16", ""),
        ("zstd", "kv", "bf16", ""),
        ("q8", "kv", "bf16", "q8"),
        ("kvz2", "kv", "bf16", "kvz2"),
        ("q8", "local", "bf16", ""),
        # Rows of quantized cells are what the worker itself would have written.
        ("rows_q8_0", "kv", "q8_0", ""),
    ],
)
def test_lossy_codecs_are_told_apart(codec, source, cell_type, fidelity):
    geometry = msgspec.structs.replace(GEOMETRY, head_dim_k=64, head_dim_v=64)
    reserve = Reserve(request_id="r", prompt=[1], sampling=Sampling(max_tokens=1), source=source, codec=codec)
    assert PrefixCache(geometry, cell_type, 1 << 24).scope(reserve) == Scope(fidelity)
    alone = msgspec.structs.replace(reserve, reuse=False)
    assert PrefixCache(geometry, cell_type, 1 << 24).scope(alone) is None
    theirs = msgspec.structs.replace(reserve, tenant="they")
    assert PrefixCache(geometry, cell_type, 1 << 24).scope(theirs) == Scope(fidelity, "they")


def test_lossy_kv_is_neither_lent_nor_given_to_who_wants_it_exact():
    cache = cache_of()
    cache.lend(1, PROMPT, Q8)
    keep(cache, PROMPT, Q8)
    assert cache.find(PROMPT, EXACT) == cache.find(PROMPT, Scope("kvz1")) == Plan()
    assert cache.find(PROMPT, Q8) == Plan(199, 1, 199)


def test_who_shares_with_nobody_leaves_nothing_behind():
    cache = cache_of()
    keep(cache, PROMPT, None)
    cache.lend(1, PROMPT, None)
    assert cache.find(PROMPT, EXACT) == cache.find(PROMPT, None) == Plan()
    keep(cache, PROMPT)
    cache.lend(1, PROMPT, EXACT)
    assert cache.find(PROMPT, None) == Plan()
    assert cache.find(PROMPT, EXACT).num_tokens == 199


def test_tenants_share_neither_cells_nor_blocks_nor_names():
    cache = cache_of()
    mine, theirs = Scope(tenant="me"), Scope(tenant="they")
    cache.lend(1, PROMPT, mine)
    keep(cache, PROMPT, mine)
    assert cache.find(PROMPT, theirs) == cache.find(PROMPT, EXACT) == Plan()
    keep(cache, PROMPT, theirs)
    assert (cache.find(PROMPT, theirs).donor, cache.find(PROMPT, mine).donor) == (None, 1)
    cache.take_back(1)
    names = [block.name for scope in (mine, theirs) for block in cache.find(PROMPT, scope).path if block.name]
    assert len(set(names)) == len(names) == 6


def test_the_index_follows_cells_and_ram():
    cache = cache_of(4 * cache_of().block_bytes)
    root = block_names.root(cache.seed, "", "")
    names = [name[:8] for name in block_names.names(root, PROMPT, 64)]

    def index() -> dict[str, list[bytes]]:
        return {tier: sorted(keys) for tier, keys in cache.known.since(0).added.items()}

    cache.lend(1, PROMPT, EXACT)
    assert index() == {"cells": sorted(names)}
    keep(cache, PROMPT)
    assert index() == {"cells": sorted(names)}
    cache.take_back(1)
    assert index() == {"ram": sorted(names)}
    keep(cache, PROMPT[::-1])
    assert names[0] not in index()["ram"]
    assert len(index()["ram"]) <= 4


class Below(LowerTiers):
    """Says that there is a tier, and takes what it is to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.got: dict[bytes, np.ndarray] = {}

    def __bool__(self) -> bool:
        return True

    def keep(self, blocks) -> None:
        self.got |= {block.name: block.payload for block in blocks}


def pooled(max_bytes: int = 1 << 24) -> tuple[PrefixCache, Below]:
    below = Below()
    return PrefixCache(GEOMETRY, "bf16", max_bytes, b"seed", BlockLog(), below), below


def fetched(cache: PrefixCache, below: Below, prompt: list[int], scope: Scope = EXACT) -> Plan:
    """What a prompt finds once all that is below has come back."""
    missing = cache.missing(prompt, scope)
    pieces = []
    for names in zip(*(found for _, found in missing.chains), strict=True) if missing else ():
        there = [(name, kind) for name, (kind, _) in zip(names, missing.chains, strict=True) if name in below.got]
        if not there:
            break
        pieces.append(Piece(below.got[there[0][0]], there[0][1], "disk"))
    if missing:
        cache.take_in(prompt, scope, missing.first, Fetched("r", pieces, 1000 * len(pieces)))
    return cache.find(prompt, scope)


def test_what_left_ram_comes_back_from_below():
    cache, below = pooled()
    keep(cache, PROMPT)
    assert len(below.got) == 3
    assert cache.missing(PROMPT, EXACT) is None
    again, _ = pooled()
    plan = fetched(again, below, PROMPT)
    # Full blocks only: the rest of the prompt is computed.
    assert (plan.num_tokens, plan.restored_tokens, plan.fetch_ns) == (192, 192, 3000)
    assert all(np.array_equal(block.buffer, below.got[block.name]) for block in plan.path)
    again.use(plan)
    again.used(plan)
    assert [(tier.name, tier.hits, tier.hit_tokens) for tier in again.tiers(0, 1)] == [("cells", 0, 0), ("ram", 0, 0)]
    assert again._hit_tokens == {"disk": 192}
    # From now on it is RAM's.
    again.use(again.find(PROMPT, EXACT))
    assert (again._hit_tokens["ram"], again.find(PROMPT, EXACT).fetch_ns) == (192, 0)


def test_only_what_ram_lacks_is_asked_for():
    cache, below = pooled()
    keep(cache, PROMPT)
    again, _ = pooled()
    keep(again, PROMPT[:100])
    assert (again.missing(PROMPT, EXACT).first, again.missing(PROMPT, EXACT).num_blocks) == (1, 2)
    assert fetched(again, below, PROMPT).num_tokens == 192
    assert again.missing([*PROMPT[:64], 5], EXACT) is None
    assert again.missing(PROMPT, None) is None
    assert again.missing([1, 2, 3], EXACT) is None
    lent, _ = pooled()
    lent.lend(1, PROMPT, EXACT)
    assert lent.missing(PROMPT, EXACT) is None
    assert cache_of().missing(PROMPT, EXACT) is None


def test_what_comes_back_for_another_tenant_or_codec_is_named_otherwise():
    cache, below = pooled()
    keep(cache, PROMPT[:64])
    keep(cache, PROMPT, Q8)
    again, _ = pooled()
    assert fetched(again, below, PROMPT, Scope(tenant="they")) == Plan()
    assert fetched(again, below, PROMPT).num_tokens == 64
    lossy = fetched(again, below, PROMPT, Q8)
    assert [block.fidelity for block in lossy.path] == ["", "q8", "q8"]
    assert again.find(PROMPT, EXACT).num_tokens == 64


def test_a_prompt_that_is_larger_than_ram_comes_back_in_part():
    cache, below = pooled()
    keep(cache, PROMPT)
    small, _ = pooled(2 * cache.block_bytes)
    assert small.missing(PROMPT, EXACT).num_blocks == 2
    assert fetched(small, below, PROMPT).num_tokens == 128


def test_blocks_whose_beginning_has_gone_meanwhile_are_of_no_use():
    cache, below = pooled()
    keep(cache, PROMPT)
    again, _ = pooled()
    keep(again, PROMPT[:64])
    missing = again.missing(PROMPT, EXACT)
    again._tree.discard(again.find(PROMPT, EXACT).path[0])
    pieces = [Piece(below.got[name], "", "disk") for name in missing.chains[0][1]]
    again.take_in(PROMPT, EXACT, missing.first, Fetched("r", pieces, 5))
    assert again.find(PROMPT, EXACT) == Plan()
    assert again.used_bytes == 0


def test_a_block_of_another_size_is_not_taken():
    cache, below = pooled()
    keep(cache, PROMPT)
    again, _ = pooled()
    names = list(below.got)
    below.got[names[1]] = below.got[names[1]][:-1]
    assert fetched(again, below, PROMPT).num_tokens == 64
    assert len(again._tree) == 1


def test_ten_thousand_tiny_prompts_stay_in_ram_and_leave_room_for_others():
    cache, below = pooled(30 * cache_of().block_bytes)
    hot = PROMPT[:129]
    keep(cache, hot)
    assert cache.find(hot, EXACT).num_tokens == 128
    for number in range(10_000):
        prompt = [0, 1, 2, number % 7, *divmod(number, 100), *range(20)]
        assert cache.find(prompt, EXACT).num_tokens <= len(prompt) - 1
        keep(cache, prompt)
    assert cache.used_bytes <= 30 * cache.block_bytes
    assert cache.find(hot, EXACT).num_tokens == 128
    # Nothing of less than a block goes below.
    assert len(below.got) == 2


def test_blocks_that_the_engine_could_not_fill_are_forgotten_and_those_in_use_stay():
    cache = cache_of()
    keep(cache, PROMPT[:BLOCK_TOKENS])
    cache.kept(cache.keep(PROMPT, EXACT))
    plan = cache.find(PROMPT, EXACT)
    assert plan.num_tokens == BLOCK_TOKENS
    cache.use(plan)
    assert (cache.hits, cache.reused_tokens) == (1, BLOCK_TOKENS)
    assert [block.pins for block in plan.path] == [1]
    cache.used(plan)
    assert [block.pins for block in plan.path] == [0]


@pytest.mark.parametrize("tokens", [range(8, 11), range(13, 18), range(8, 18)])
def test_a_cut_state_is_the_state_of_fewer_tokens_whatever_the_order_of_its_rows(tokens):
    elements = np.arange(4 * 18 * 2 * (16 + 8), dtype=np.uint16).reshape(4, -1)
    whole = chunk_of(GEOMETRY, elements, 8, 18)
    blob = StateBlob(whole.buffer, whole.num_bytes, 8, 10)
    expected = chunk_of(GEOMETRY, elements, tokens.start, tokens.stop)
    part = cut(blob, tokens)
    assert part[1:] == (expected.num_bytes, tokens.start, len(tokens))
    assert np.array_equal(part.buffer, expected.buffer)
    # Rows in another order come out in that order.
    order = np.roll(np.arange(10), 4)
    assert np.array_equal(
        cut(reordered(blob, order), tokens).buffer, reordered(blob_of(expected), kept(order, tokens)).buffer
    )


def blob_of(chunk) -> StateBlob:
    return StateBlob(chunk.buffer, chunk.num_bytes, chunk.start_token, chunk.num_tokens)


def kept(order: np.ndarray, tokens: range) -> np.ndarray:
    """The rows of ``tokens`` among rows in ``order``, which begin at token 8, counted from the first that is kept."""
    return np.array([row - (tokens.start - 8) for row in order if row + 8 in tokens])


def reordered(blob: StateBlob, order: np.ndarray) -> StateBlob:
    """The same state with its rows in another order; ``GEOMETRY`` has one cache."""
    buffer = blob.buffer.copy()
    sizes = [12, *[2 * 2 * 16] * 4, *[2 * 2 * 8] * 4]
    at = 16
    for number, size in enumerate(sizes):
        rows = buffer[at : at + size * order.size].reshape(order.size, size)
        rows[:] = rows[order]
        at += size * order.size + (8 + 12 if number == 0 else 12)
    return StateBlob(buffer, blob.num_bytes, blob.start_token, blob.num_tokens)
