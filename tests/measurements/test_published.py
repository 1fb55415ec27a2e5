"""What was published elsewhere, and the simulation of it."""

from __future__ import annotations

import pytest

from measurements.published import EXO, TWO_SPARKS, Point, points, summary


@pytest.fixture(scope="module")
def by_name() -> dict[tuple[str, str], Point]:
    return {(point.source, point.what): point for point in points()}


def test_profiles_that_were_set_by_a_number_meet_it(by_name: dict[tuple[str, str], Point]) -> None:
    fitted = [point for point in by_name.values() if point.note == "a profile is set by it"]
    assert len(fitted) == 9
    for point in fitted:
        assert abs(point.error) < 0.02, point


def test_what_no_profile_was_set_by_is_within_15_percent(by_name: dict[tuple[str, str], Point]) -> None:
    counted = [point for point in by_name.values() if point.counts]
    assert len(counted) == summary()["validation_points"] == 10
    for point in counted:
        assert abs(point.error) < 0.15, point
    assert summary()["validation_error_median"] < 0.06


def test_the_table_of_exo(by_name: dict[tuple[str, str], Point]) -> None:
    assert by_name[EXO, "split, total"].predicted == pytest.approx(2.32, rel=0.03)
    assert by_name[EXO, "split over M3 Ultra alone"].predicted == pytest.approx(2.8, rel=0.05)
    assert by_name[EXO, "split over DGX Spark alone"].predicted == pytest.approx(1.9, rel=0.05)


def test_replicas_that_batch_do_not_lose_to_one_node(by_name: dict[tuple[str, str], Point]) -> None:
    single, replicated = by_name[TWO_SPARKS, "single node"], by_name[TWO_SPARKS, "replicated"]
    assert replicated.predicted > 0.95 * single.predicted
    assert not replicated.counts
    assert "not reproduced" in replicated.note
    assert abs(by_name[TWO_SPARKS, "replicated, one by one on each"].error) < 0.15
