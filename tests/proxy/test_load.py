"""What a node is busy with, and what vLLM is thought to hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import load
from proxy.load import BLOCK_TOKENS, Backlog, Beside, Occupancy, RecentPrefixes, VllmLoad, Watch

SECOND = 10**9


def test_prefills_stand_one_behind_the_other_until_they_end():
    backlog = Backlog()
    assert backlog.ns == 0
    first, second = backlog.begin(100 * SECOND), backlog.begin(50 * SECOND)
    assert backlog.ns == pytest.approx(150 * SECOND, abs=SECOND)
    backlog.end(first)
    backlog.end(first)
    assert backlog.ns > 0
    backlog.end(second)
    assert backlog.ns == 0
    # What was overestimated before is not carried on.
    backlog.begin(SECOND)
    assert backlog.ns <= SECOND


def test_what_is_late_is_done_any_moment():
    backlog = Backlog()
    backlog.begin(0)
    assert backlog.ns == 0


def test_what_decodes_is_counted_while_it_does():
    vllm = VllmLoad()
    with pytest.raises(KeyError), vllm.holding(2, 300):
        assert (vllm.sequences, vllm.context_tokens) == (2, 300)
        raise KeyError
    assert (vllm.sequences, vllm.context_tokens) == (0, 0)


def test_what_goes_on_beside_a_stage_is_averaged_over_it(monkeypatch):
    now_ns = 0
    monkeypatch.setattr(load.time, "monotonic_ns", lambda: now_ns)
    own, other = Occupancy(), Occupancy()
    with own.working(1, 100), Watch(own, other) as watch:
        now_ns = 1 * SECOND
        with own.working(2, 400), other.working():
            now_ns = 2 * SECOND
            own.prefilled(70)
        with own.working():
            now_ns = 4 * SECOND
    now_ns = 4 * SECOND + watch.together_ns
    own.prefilled(5)
    assert watch.beside(0, 0) == Beside(1.5, 200.0, 70, 0.25)
    assert watch.beside(0, watch.together_ns).prefilled_tokens == 75
    assert watch.beside(2 * SECOND, 0).prefilled_tokens == 0
    now_ns = 5 * SECOND
    assert (own.idle_ns, other.idle_ns) == (1 * SECOND, 3 * SECOND)


@given(st.integers(1, 5 * BLOCK_TOKENS), st.integers(0, 5 * BLOCK_TOKENS), st.integers(0, 300))
def test_whole_blocks_of_what_was_computed_are_known(length, same, more):
    prefixes = RecentPrefixes()
    prompt = list(range(length))
    prefixes.add(prompt, "a")
    same = min(same, length)
    asked = [*prompt[:same], *range(10**6, 10**6 + more + 1)]
    assert prefixes.held_tokens(asked, "a") == same // BLOCK_TOKENS * BLOCK_TOKENS
    assert prefixes.held_tokens(prompt, "a") == min(length // BLOCK_TOKENS * BLOCK_TOKENS, length - 1)
    assert prefixes.held_tokens(prompt, "b") == 0


def test_no_more_is_remembered_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(load, "MAX_BLOCKS", 2)
    prefixes = RecentPrefixes()
    prompts = [[number] * (BLOCK_TOKENS + 1) for number in range(3)]
    for prompt in prompts:
        prefixes.add(prompt, "")
    assert [prefixes.held_tokens(prompt, "") for prompt in prompts] == [0, BLOCK_TOKENS, BLOCK_TOKENS]
