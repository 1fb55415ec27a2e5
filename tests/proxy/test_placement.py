"""Which worker gets a request: as long as nothing speaks against it, the one that got its like."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.placement import AFFINITY_TOKENS, MAX_EXTRA_LOAD, Candidate, place

PROMPT = list(range(100))
prompts = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=2 * AFFINITY_TOKENS)
candidates = st.lists(
    st.builds(
        Candidate,
        name=st.text(max_size=8),
        free_cells=st.integers(-10, 100),
        free_sequences=st.integers(-2, 4),
        load=st.floats(0, 2),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda candidate: candidate.name,
)


def idle(*names: str) -> list[Candidate]:
    return [Candidate(name, 1000, 16, 0.0) for name in names]


@given(prompts, st.integers(1, 100), st.integers(1, 4), candidates)
def test_a_worker_with_room_and_little_load_is_chosen(prompt, cells, sequences, workers):
    chosen = next(each for each in workers if each.name == place(prompt, cells, sequences, workers))
    roomy = [each for each in workers if each.free_cells >= cells and each.free_sequences >= sequences]
    assert chosen in roomy or not roomy
    assert chosen.load <= min(each.load for each in roomy or workers) + MAX_EXTRA_LOAD
    assert place(prompt, cells, sequences, workers[::-1]) == chosen.name


@given(prompts)
def test_turns_of_a_conversation_meet_again(prompt):
    turn = (prompt * AFFINITY_TOKENS)[:AFFINITY_TOKENS]
    workers = idle("a", "b", "c")
    assert len({place(turn + more, 1, 1, workers) for more in ([], [1], [2, 3] * 50)}) == 1


def test_conversations_spread():
    chosen = [place([number, 7, 7], 1, 1, idle("a", "b", "c")) for number in range(300)]
    assert min(chosen.count(name) for name in "abc") > 60


def test_a_new_worker_takes_from_all_and_moves_nothing_else():
    before = {number: place([number], 1, 1, idle("a", "b", "c")) for number in range(200)}
    after = {number: place([number], 1, 1, idle("a", "b", "c", "d")) for number in range(200)}
    moved = {number for number in before if before[number] != after[number]}
    assert {after[number] for number in moved} == {"d"}
    assert {before[number] for number in moved} == {"a", "b", "c"}


def test_a_preferred_worker_that_is_full_or_busy_is_passed_over():
    first = place(PROMPT, 10, 1, idle("a", "b"))
    (other,) = {"a", "b"} - {first}
    for state in ({"free_cells": 9}, {"free_sequences": 0}, {"load": MAX_EXTRA_LOAD + 0.01}):
        workers = [each._replace(**state) if each.name == first else each for each in idle("a", "b")]
        assert place(PROMPT, 10, 1, workers) == other
    # A little more to do is no reason.
    workers = [each._replace(load=0.2) if each.name == first else each for each in idle("a", "b")]
    assert place(PROMPT, 10, 1, workers) == first
