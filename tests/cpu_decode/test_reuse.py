"""Where a prompt's beginning comes from, and who may have whose KV."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from cpu_decode.prefix import EXACT
from cpu_decode.reuse import BLOCK_TOKENS, LEAST_TOKENS, Plan, PrefixCache
from cpu_decode.state import StateBlob, cut
from tests.cpu_decode.native_kv import chunk_of
from tests.cpu_decode.test_landing import GEOMETRY
from transfer.layout import CellType
from transfer.messages import Reserve, Sampling

PROMPT = list(range(200))


def cache_of(max_bytes: int = 1 << 24, window: int = 0, cell_type: CellType = "bf16") -> PrefixCache:
    return PrefixCache(msgspec.structs.replace(GEOMETRY, sliding_window=window), cell_type, max_bytes)


def keep(cache: PrefixCache, tokens: list[int], fidelity: str = EXACT) -> None:
    blocks = cache.keep(tokens, fidelity)
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
        ("raw", "kv", "bf16", EXACT),
        ("lz4", "kv", "f16", EXACT),
        ("zstd", "kv", "bf16", EXACT),
        ("q8", "kv", "bf16", "q8"),
        ("kvz2", "kv", "bf16", "kvz2"),
        ("q8", "local", "bf16", EXACT),
        # Rows of quantized cells are what the worker itself would have written.
        ("rows_q8_0", "kv", "q8_0", EXACT),
    ],
)
def test_lossy_codecs_are_told_apart(codec, source, cell_type, fidelity):
    geometry = msgspec.structs.replace(GEOMETRY, head_dim_k=64, head_dim_v=64)
    reserve = Reserve(request_id="r", prompt=[1], sampling=Sampling(max_tokens=1), source=source, codec=codec)
    assert PrefixCache(geometry, cell_type, 1 << 24).fidelity(reserve) == fidelity


def test_lossy_kv_is_neither_lent_nor_given_to_who_wants_it_exact():
    cache = cache_of()
    cache.lend(1, PROMPT, "q8")
    keep(cache, PROMPT, "q8")
    assert cache.find(PROMPT, EXACT) == cache.find(PROMPT, "kvz1") == Plan()
    assert cache.find(PROMPT, "q8") == Plan(199, 1, 199)


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
