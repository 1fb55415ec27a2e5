"""Rates, intervals and crossings, against what can be worked out by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from measurements import crossover_numbers as numbers
from measurements.crossover_cells import Timed
from measurements.crossover_numbers import Advantage
from measurements.workloads import Workload

WORKLOAD = Workload("w", 10, 11, ttft_slo_s=1.0, tpot_slo_s=0.1)


def timed(e2e_s: float, ttft_s: float = 0.1, output_tokens: int = 11) -> Timed:
    return Timed(began_s=0, ttft_s=ttft_s, e2e_s=e2e_s, itl_s=[0.01], prompt_tokens=10, output_tokens=output_tokens)


def test_rates_are_those_of_clients_that_ask_again_at_once() -> None:
    requests = [timed(1.0), timed(3.0)]
    assert numbers.tokens_per_s(requests, 4) == pytest.approx(4 * 11 / 2)
    # 1.0 s: 90 ms a token; 3.0 s: 290 ms.
    row = numbers.row({0: requests}, 4, WORKLOAD)
    assert (row["tokens_per_s"], row["goodput_per_s"]) == (pytest.approx(22), pytest.approx(4 * 1 / 4))


def test_a_row_has_percentiles_and_intervals_around_them() -> None:
    chosen = np.random.default_rng(1)
    rounds = {turn: [timed(float(each)) for each in chosen.uniform(1, 2, 20)] for turn in range(3)}
    row = numbers.row(rounds, 2, WORKLOAD)
    assert (row["requests"], row["rounds"]) == (60, 3)
    assert row["e2e_s"]["p50_low"] < row["e2e_s"]["p50"] < row["e2e_s"]["p50_high"]
    low, high = row["tokens_per_s_interval"]
    assert low < row["tokens_per_s"] < high
    assert row["e2e_s"]["p50"] < row["e2e_s"]["p90"] < row["e2e_s"]["p99"]


def options(**seconds: list[float]) -> dict[str, numbers.Rounds]:
    """Rounds of two requests that each take so long, by option (``_`` for a space)."""
    return {
        name.replace("_", " "): {turn: [timed(each), timed(each * 1.01)] for turn, each in enumerate(values)}
        for name, values in seconds.items()
    }


def test_the_best_split_is_set_against_the_best_of_the_others_and_auto_is_neither() -> None:
    found = numbers.advantage(
        options(gpu=[2, 2], cpu=[5, 5], replicated=[3, 3], split_raw=[1.1, 1.1], split_q8=[1, 1], auto=[0.1, 0.1])
    )
    assert found is not None
    each, draws = found
    assert (each.split, each.other, each.word) == ("split q8", "gpu", "split")
    assert each.ratio == pytest.approx(2)
    assert each.low <= each.ratio <= each.high
    assert draws.shape == (numbers.DRAWS,)


def test_rounds_that_disagree_about_who_is_faster_decide_nothing() -> None:
    found = numbers.advantage(options(gpu=[1, 1], split_raw=[0.5, 1.6]))
    assert found is not None
    assert found[0].word == "even"
    assert found[0].low < 1 < found[0].high


def test_a_slow_round_for_both_is_no_noise_in_their_ratio() -> None:
    found = numbers.advantage(options(gpu=[1, 9], split_raw=[0.5, 4.5]))
    assert found is not None
    assert found[0].low == pytest.approx(2, rel=0.05)


def test_only_rounds_that_both_sides_have_count() -> None:
    both = options(gpu=[1, 1], split_raw=[0.5, 0.5])
    del both["gpu"][0]
    both["split raw"][0] = [timed(100.0)]
    found = numbers.advantage(both)
    assert found is not None
    assert found[0].ratio == pytest.approx(2)
    del both["gpu"][1]
    assert numbers.advantage(both) is None


@pytest.mark.parametrize(
    ("ratio", "low", "high", "word"),
    [(1.2, 1.1, 1.3, "split"), (1.2, 0.9, 1.5, "even"), (1.04, 1.03, 1.05, "even"), (0.8, 0.7, 0.9, "whole")],
)
def test_words(ratio: float, low: float, high: float, word: str) -> None:
    assert numbers.word(ratio, low, high) == word


def at(ratio: float) -> Advantage:
    return Advantage("split raw", "gpu", ratio, ratio * 0.9, ratio * 1.1, numbers.word(ratio, ratio * 0.9, ratio * 1.1))


def test_crossings_say_between_which_points_and_about_where() -> None:
    starts, stops = numbers.crossings({1: at(0.5), 4: at(2.0), 16: at(0.99)})
    assert (starts.turn, starts.low, starts.high, starts.clear) == ("starts", 1, 4, True)
    assert starts.at == pytest.approx(2)
    assert (stops.turn, stops.low, stops.high, stops.clear) == ("stops", 4, 16, False)
    assert numbers.crossings({1: at(1.2), 4: at(2.0)}) == []


@settings(deadline=None)
@given(st.dictionaries(st.integers(1, 512), st.floats(0.1, 10), min_size=2, max_size=8))
def test_a_crossing_lies_between_its_points_and_turns_alternate(ratios: dict[int, float]) -> None:
    found = numbers.crossings({place: at(ratio) for place, ratio in ratios.items()})
    assert all(each.low <= each.at * (1 + 1e-9) and each.at <= each.high * (1 + 1e-9) for each in found)
    assert all(one.turn != other.turn for one, other in pairwise(found))


def test_overall_is_the_geometric_mean() -> None:
    draws = np.full(numbers.DRAWS, 1.0)
    whole = numbers.overall([(at(4.0), 4 * draws), (at(1.0), draws)])
    assert (whole.ratio, whole.low, whole.word) == (pytest.approx(2), pytest.approx(2), "split")


def test_where_splitting_wins_at_one_load_and_loses_at_another_it_depends() -> None:
    draws = np.full(numbers.DRAWS, 1.0)
    whole = numbers.overall([(at(2.0), 2 * draws), (at(0.5), 0.5 * draws)])
    assert (whole.word, whole.repeats) == ("depends", 1)


def test_each_load_alone_may_be_in_doubt_where_the_turn_is_not() -> None:
    chosen = np.random.default_rng(0)

    def noisy(ratio: float, spread: float) -> tuple[Advantage, numbers.Draws]:
        draws = np.exp(chosen.normal(np.log(ratio), spread, numbers.DRAWS))
        low, high = np.percentile(draws, [2.5, 97.5])
        return Advantage("split raw", "gpu", ratio, low, high, numbers.word(ratio, low, high)), draws

    one, other = noisy(1.12, 0.07), noisy(0.89, 0.07)
    assert (one[0].word, other[0].word) == ("even", "even")
    assert numbers.overall([one, other]).word == "depends"
    # Not where the two differ by noise, nor where one of them is about equal.
    assert numbers.overall([noisy(1.12, 0.12), noisy(0.89, 0.12)]).word == "even"
    assert numbers.overall([noisy(1.03, 0.01), noisy(0.7, 0.01)]).word == "whole"


def test_how_often_another_measurement_would_say_the_same() -> None:
    chosen = np.random.default_rng(0)
    drawn = {spread: np.exp(chosen.normal(np.log(1.2), spread, numbers.DRAWS)) for spread in (0.01, 0.09)}
    sure, unsure = (numbers.overall([(at(1.2), draws)]) for draws in drawn.values())
    assert (sure.word, sure.repeats) == ("split", 1)
    # The interval ends near 1, and that of about half of all others holds it.
    assert unsure.low == pytest.approx(1, abs=0.02)
    assert unsure.repeats == pytest.approx(0.5, abs=0.15)
