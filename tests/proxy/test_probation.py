"""When codecs that are off are tried again, and what brings them back."""

from __future__ import annotations

import pytest

from proxy.probation import FIRST_PAUSE_S, GOOD_TO_RETURN, MAX_PAUSE_S, Probations

NS = 1_000_000_000


@pytest.fixture
def probations() -> Probations:
    """q8 is off for worker a."""
    made = Probations()
    made.begin("a", "q8", ("q8",), "wrong", 0)
    return made


def test_the_pause_doubles_up_to_a_limit(probations):
    now_ns, pause_s = 0, FIRST_PAUSE_S
    for _ in range(12):
        assert probations.due(now_ns + int(pause_s * NS) - 1) is None
        now_ns += int(pause_s * NS)
        assert probations.due(now_ns) == ("a", "q8")
        probations.failed("a", "q8", now_ns)
        pause_s = min(2 * pause_s, MAX_PAUSE_S)
    assert probations.view(now_ns)[0]["next_try_s"] == MAX_PAUSE_S


def test_a_try_that_shows_nothing_is_made_again_after_the_same_pause(probations):
    probations.passed("a", "q8")
    probations.postpone("a", "q8", 10 * NS)
    assert probations.view(10 * NS)[0] | {"next_try_s": FIRST_PAUSE_S, "good": 1} == probations.view(10 * NS)[0]


def test_good_ones_in_a_row_bring_it_back(probations):
    for _ in range(GOOD_TO_RETURN - 1):
        assert not probations.passed("a", "q8")
        # At once.
        assert probations.due(int(FIRST_PAUSE_S * NS)) == ("a", "q8")
    probations.failed("a", "q8", 0)
    assert [probations.passed("a", "q8") for _ in range(GOOD_TO_RETURN)] == [False] * (GOOD_TO_RETURN - 1) + [True]
    assert probations.distrusted("a") == {}
    assert probations.due(10**18) is None


def test_what_is_off_for_two_reasons_comes_back_with_the_second(probations):
    probations.begin("a", "raw", ("raw", "q8", "lz4"), "all wrong", 0)
    probations.begin("b", "q8", ("q8",), "there, too", 0)
    assert probations.distrusted("a") == {"q8": "wrong", "raw": "all wrong", "lz4": "all wrong"}
    for _ in range(GOOD_TO_RETURN):
        probations.passed("a", "raw")
    assert probations.distrusted("a") == {"q8": "wrong"}
    probations.forget("a")
    assert probations.distrusted("a") == {}
    assert probations.distrusted("b") == {"q8": "there, too"}
