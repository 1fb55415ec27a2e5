"""What is learned from what work took."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.costs import WINDOW, Average, Cost, Learner


def learned(num_terms: int, *observations: tuple[int, tuple[float, ...]]) -> Learner:
    learner = Learner(num_terms)
    for took_ns, terms in observations:
        learner.observe(took_ns, *terms)
    return learner


@given(
    st.integers(0, 10**9),
    st.integers(10**3, 10**7),
    st.lists(st.integers(1, 10_000), min_size=8, max_size=30),
)
def test_a_line_is_learned_where_it_was_seen(fixed_ns, token_ns, lengths):
    cost = learned(2, *((fixed_ns + token_ns * tokens, (tokens, 1)) for tokens in lengths)).cost
    for tokens in lengths:
        assert cost.at(tokens, 1) == pytest.approx(fixed_ns + token_ns * tokens, rel=0.15, abs=1e5)


@given(
    st.lists(st.tuples(st.integers(0, 10**11), st.tuples(st.integers(0, 10_000), st.just(1))), min_size=1, max_size=30)
)
def test_whatever_is_observed_more_work_takes_no_less_time(observations):
    cost = learned(2, *observations).cost
    guesses = [cost.at(tokens, 1) for tokens in (0, 1, 100, 10_000)]
    assert guesses == sorted(guesses)
    assert guesses[0] >= 0


def test_a_step_is_learned_by_batch_and_context():
    random.seed(1)
    learner = Learner(3)
    for _ in range(WINDOW):
        sequences, context = random.randint(1, 16), random.randint(100, 30_000)
        noise = random.uniform(0.97, 1.03)
        learner.observe(round((8e6 + 5e5 * sequences + 400 * context) * noise), 1, sequences, context)
    assert learner.cost.ns == pytest.approx((8e6, 5e5, 400), rel=0.15)
    assert learner.cost.samples == WINDOW


@pytest.mark.parametrize("crowding", [0.0, 0.5, 1.0])
def test_what_the_other_engine_takes_is_learned_and_kept_where_nothing_more_can_tell(crowding):
    random.seed(2)
    learner = Learner(3)
    for _ in range(WINDOW):
        sequences, crowd = random.randint(1, 16), random.choice((0.0, 0.4, 1.0))
        learner.observe(round((8e6 + 5e5 * sequences) * (1 + crowding * crowd)), 1, sequences, 0, crowd=crowd)
    assert learner.cost.crowding == crowding
    assert learner.cost.at(1, 8, 0) == pytest.approx(12e6, rel=0.05)
    assert learner.cost.at(1, 8, 0, crowd=1.0) == pytest.approx(12e6 * (1 + crowding), rel=0.05)
    for _ in range(WINDOW):
        learner.observe(round(12e6 * (1 + crowding)), 1, 8, 0, crowd=1.0)
    assert learner.cost.crowding == crowding


def test_work_of_one_size_is_all_due_to_the_first_term():
    for other in (1, 5):
        assert learned(2, *[(10**9, (100, other))] * 5).cost.ns == (10**7, 0)


def test_one_outlier_changes_little():
    usual = [(10**9 + number * 10**6, (1,)) for number in range(20)]
    for odd in (10**11, 10**6):
        assert learned(1, *usual, (odd, (1,))).cost.at(1) == pytest.approx(10**9, rel=0.25)


@pytest.mark.parametrize(("before", "after"), [(10**9, 10**8), (10**8, 10**9)])
def test_what_is_long_ago_is_forgotten(before, after):
    learner = learned(2, *[(before, (100, 1))] * 50, *[(after, (100, 1))] * 50)
    assert learner.cost.at(100, 1) == pytest.approx(after, rel=0.1)


def test_nothing_is_known_before_the_first_observation():
    assert Learner(2).cost is None
    assert Average().value is None


def test_what_takes_no_time_costs_nothing():
    assert learned(2, (0, (1000, 1)), (0, (10, 1))).cost == Cost((0.0, 0.0), 2)
