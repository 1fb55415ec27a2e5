import time

import pytest

from transfer.stages import Meter


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    now = [1000]
    monkeypatch.setattr(time, "monotonic_ns", lambda: now[0])
    return now


def test_a_stage_adds_up(clock):
    meter = Meter()
    for took_ns in (5, 7):
        with meter.stage("gather_ns"):
            clock[0] += took_ns
    assert meter.ns == {"gather_ns": 12}


def test_stages_are_kept_apart_and_may_nest(clock):
    meter = Meter()
    with meter.stage("outer_ns"):
        clock[0] += 1
        with meter.stage("inner_ns"):
            clock[0] += 2
    assert meter.ns == {"outer_ns": 3, "inner_ns": 2}


def test_a_stage_that_raises_is_timed(clock):
    meter = Meter()
    with pytest.raises(ValueError, match="boom"), meter.stage("encode_ns"):
        clock[0] += 9
        raise ValueError("boom")
    assert meter.ns["encode_ns"] == 9


def test_a_stage_never_entered_took_no_time():
    assert Meter().ns["wire_ns"] == 0
