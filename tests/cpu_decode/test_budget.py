from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_decode.budget import MAX_SLOWDOWN, MIN_TOKENS, STEP_NS, PrefillBudget

MS = 1_000_000


def run(budget: PrefillBudget, cost_ns: Callable[[int, int], float], decoding: int, steps: int) -> tuple[int, float]:
    """Alternate as the engine does on a machine where a step costs ``cost_ns``; the last budget and its slowdown."""
    for _ in range(5):
        budget.observe(decoding, 0, int(cost_ns(decoding, 0)))
    for _ in range(steps):
        tokens = budget.tokens(decoding)
        budget.observe(decoding, tokens, int(cost_ns(decoding, tokens)))
    tokens = budget.tokens(decoding)
    return tokens, cost_ns(decoding, tokens) / cost_ns(decoding, 0)


def test_alone_a_prompt_takes_the_whole_batch() -> None:
    budget = PrefillBudget(512)
    budget.calibrate(400)
    assert budget.tokens(0) == 512


def test_before_anything_is_known_a_prompt_gets_the_least() -> None:
    assert PrefillBudget(512).tokens(8) == MIN_TOKENS


def test_where_all_steps_had_a_prefill_in_them_prompts_do_not_starve() -> None:
    """A new worker's first prompts, several at once: a step of which nobody knows the length may take what all may."""
    budget = PrefillBudget(512)
    budget.calibrate(1000)
    for _ in range(3):
        assert budget.tokens(2) == STEP_NS // MS
        budget.observe(2, 40, 60 * MS)


@given(
    step_ms=st.floats(1, 500),
    token_ms=st.floats(0.01, 20),
    calibrated=st.floats(10, 100_000),
    decoding=st.integers(1, 16),
)
def test_steps_with_prefill_stay_within_the_slowdown_or_at_the_least(
    step_ms: float, token_ms: float, calibrated: float, decoding: int
) -> None:
    budget = PrefillBudget(512)
    budget.calibrate(calibrated)
    tokens, slowdown = run(budget, lambda _, prefill: (step_ms + prefill * token_ms) * MS, decoding, steps=100)
    allowed = max(MAX_SLOWDOWN, STEP_NS / MS / step_ms)
    assert tokens == MIN_TOKENS or slowdown <= 1.01 * allowed
    # And the room is used: another half as much would not fit.
    assert tokens == 512 or (step_ms + 1.5 * (tokens + 1) * token_ms) / step_ms > allowed


def test_a_jump_in_cost_between_one_row_and_many_is_learnt() -> None:
    def cost_ns(_decoding: int, prefill: int) -> float:
        return (100 + (150 + 0.5 * prefill if prefill else 0)) * MS

    budget = PrefillBudget(512)
    budget.calibrate(2_000)
    tokens, _ = run(budget, cost_ns, 8, steps=100)
    assert tokens == MIN_TOKENS


@pytest.mark.parametrize(("seen", "asked"), [(4, 6), (8, 6)])
def test_a_number_of_sequences_never_seen_takes_the_nearest(seen: int, asked: int) -> None:
    budget = PrefillBudget(512)
    budget.calibrate(1000)
    budget.observe(seen, 0, 100 * MS)
    assert budget.tokens(asked) == int((MAX_SLOWDOWN - 1) * 100)


def test_a_step_that_the_host_held_up_just_before_a_prefill_counts_for_nothing() -> None:
    budget = PrefillBudget(512)
    budget.calibrate(1000)
    for step_ms in (60, 60, 60, 61, 300):
        budget.observe(8, 0, step_ms * MS)
    assert budget.tokens(8) == int((MAX_SLOWDOWN - 1) * 60)
