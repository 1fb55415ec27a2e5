"""When to guess, and how much: the decisions, without an engine."""

from __future__ import annotations

import itertools
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_decode.speculate import FIRST_CHANCE, TIMED_ROWS, WORTHWHILE, Chance, Guessing, Speculation, allocate
from cpu_decode.step_costs import StepCosts
from transfer.config import Decode

MS = 1_000_000


def expected(chances: list[float], counts: tuple[int, ...]) -> float:
    """Tokens of a step: one for each sequence, and each guess whose predecessors are all right."""
    return sum(sum(chance**at for at in range(count + 1)) for chance, count in zip(chances, counts, strict=True))


@given(
    st.lists(st.tuples(st.floats(0.01, 0.99), st.integers(0, 4)), min_size=1, max_size=3),
    st.lists(st.floats(0.0, 1.5), min_size=12, max_size=12),
)
def test_no_other_allocation_makes_more_tokens_in_the_time(
    sequences: list[tuple[float, int]], steps: list[float]
) -> None:
    chances, limits = [chance for chance, _ in sequences], [limit for _, limit in sequences]
    costs = [1.0, *itertools.accumulate(steps, initial=1.0)]
    counts = allocate(chances, limits, lambda guessed: costs[guessed])
    every = itertools.product(*(range(limit + 1) for limit in limits))
    best = max(expected(chances, each) / costs[sum(each)] for each in every if any(each)) if any(limits) else 0
    plain = len(chances)
    if any(counts):
        assert expected(chances, tuple(counts)) / costs[sum(counts)] == pytest.approx(best)
        assert best > WORTHWHILE * plain
    else:
        assert best <= WORTHWHILE * plain + 1e-9


class Copying:
    """As much of a sequence as guessing from its text looks at."""

    def __init__(self) -> None:
        self.tokens = [*range(20), *range(10)]
        self.left_tokens = 50


def test_nothing_is_kept_of_a_sequence_that_ends_with_a_guess() -> None:
    speculation = Speculation(Guessing("auto"), StepCosts({1: 10.0, 16: 11.0}))
    sequence = Copying()
    (guess,) = speculation.drafts([sequence], 15)
    assert guess
    # As the engine does: it learns when the step is over, and with it the sequence.
    speculation.forget(sequence)
    speculation.observe([sequence], [guess], len(guess), 11)
    gone = weakref.ref(sequence)
    del sequence
    assert gone() is None


def test_where_every_row_costs_as_much_as_the_first_nothing_is_guessed() -> None:
    for sequences in (1, 4, 16):
        assert not any(allocate([1.0] * sequences, [8] * sequences, lambda guessed, n=sequences: 1 + guessed / n))


def test_a_sequence_that_is_copied_gets_the_rows() -> None:
    counts = allocate([0.95, 0.05, 0.05], [8, 8, 8], lambda guessed: 1 + 0.05 * guessed, most_cost=1.75)
    assert counts[0] == 8
    assert counts[1:] == [0, 0]


def test_the_others_are_not_slowed_down_without_bound() -> None:
    # Alone it would take all eight.
    assert allocate([0.99, 0.0], [8, 0], lambda guessed: 1 + 0.2 * guessed) == [8, 0]
    assert allocate([0.99, 0.0], [8, 0], lambda guessed: 1 + 0.2 * guessed, most_cost=1.75) == [3, 0]


def test_chances_are_learnt_from_what_came_whether_it_was_computed_or_not() -> None:
    lucky, unlucky = Chance(), Chance()
    for _ in range(40):
        lucky.observe([1, 2, 3], [1])
        unlucky.observe([1, 2, 3], [4])
    assert lucky.value > 0.95
    assert unlucky.value < 0.05
    before = lucky.value
    lucky.observe([1, 2, 3], [1, 2, 9])
    assert lucky.value < before


def test_a_chance_that_nobody_tests_rises_to_where_it_began() -> None:
    chance = Chance()
    for _ in range(40):
        chance.observe([1], [2])
    for _ in range(100):
        chance.rest()
    assert chance.value == FIRST_CHANCE
    chance.value = 0.9
    chance.rest()
    assert chance.value == 0.9


def test_costs_between_measured_sizes_are_those_of_the_next_larger_one() -> None:
    costs = StepCosts({1: 10.0, 2: 25.0, 4: 26.0, 8: 40.0})
    assert costs.ratio(1, 1) == 1.0
    assert costs.ratio(1, 2) == 2.5
    assert costs.ratio(1, 3) == costs.ratio(1, 4) == 2.6
    assert costs.ratio(2, 8) == 1.6
    assert costs.ratio(1, 9) == float("inf")
    assert StepCosts({}).ratio(1, 2) == float("inf")


def test_costs_that_turn_out_to_be_higher_are_believed_and_odd_steps_are_not() -> None:
    costs = StepCosts({1: 10.0 * MS, 4: 12.0 * MS})
    for _ in range(60):
        costs.observe(1, 1, 20 * MS)
        costs.observe(1, 4, 60 * MS)
    # Steps are twice as long as at the start, and four rows cost three times as much as one.
    assert costs.ratio(1, 4) == pytest.approx(3.0, rel=0.01)
    costs.observe(1, 4, 60_000 * MS)
    assert costs.ratio(1, 4) < 4.0


def test_what_a_draft_model_takes_is_part_of_the_cost() -> None:
    costs = StepCosts({1: 10.0, 2: 11.0})
    costs.observe(1, 1, 20)
    assert costs.ratio(1, 2, more_ns=10) == pytest.approx(1.1 + 0.5)


def test_the_largest_batch_of_a_lone_sequence_is_one_that_is_timed():
    # The cost of one between two sizes is taken for the larger one's: a guess more would look like many.
    assert Decode().speculate_tokens + 1 == Guessing().most_tokens + 1 == 16
    assert 16 in TIMED_ROWS
