"""A node that fails again and again is left out, for longer each time, and tried again."""

from __future__ import annotations

from proxy.breaker import FAILURES, FIRST_PAUSE_S, MAX_PAUSE_S, Breaker

SECOND = 1_000_000_000


def failed(times: int, now_ns: int = 0) -> Breaker:
    breaker = Breaker()
    for _ in range(times):
        breaker.failed(now_ns)
    return breaker


def pause_s(breaker: Breaker, now_ns: int = 0) -> float:
    return next(s for s in range(int(MAX_PAUSE_S) + 2) if not breaker.failing(now_ns + s * SECOND))


def test_a_few_failures_are_nothing():
    assert not failed(FAILURES - 1).failing(0)


def test_more_of_them_pause_the_node_for_longer_each_time():
    assert [pause_s(failed(FAILURES + more)) for more in range(4)] == [FIRST_PAUSE_S * 2**more for more in range(4)]
    assert pause_s(failed(1000)) == MAX_PAUSE_S


def test_one_request_tries_it_after_the_pause():
    breaker = failed(FAILURES)
    now_ns = 2 * SECOND
    assert not breaker.failing(now_ns)
    breaker.tried(now_ns)
    assert breaker.failing(now_ns)
    breaker.failed(now_ns)
    assert pause_s(breaker, now_ns) == 2 * FIRST_PAUSE_S


def test_success_ends_it():
    breaker = failed(FAILURES)
    breaker.succeeded()
    assert not breaker.failing(0)
    breaker.failed(0)
    assert not breaker.failing(0)


def test_trying_a_sound_node_changes_nothing():
    breaker = failed(FAILURES - 1)
    breaker.tried(0)
    assert not breaker.failing(0)
