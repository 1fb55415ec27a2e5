"""Which worker a request prefers: the one that got its like."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.placement import AFFINITY_TOKENS, Candidate, ranked

prompts = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=2 * AFFINITY_TOKENS)


def idle(*names: str) -> list[Candidate]:
    return [Candidate(name, 1000, 16, 0.0) for name in names]


def first(prompt: list[int], *names: str) -> str:
    return ranked(prompt, idle(*names))[0]


@given(prompts, st.lists(st.text(max_size=8), min_size=1, max_size=8, unique=True))
def test_all_are_ranked_however_they_are_listed(prompt, names):
    order = ranked(prompt, idle(*names))
    assert sorted(order) == sorted(names)
    assert ranked(prompt, idle(*names[::-1])) == order


@given(prompts)
def test_turns_of_a_conversation_meet_again(prompt):
    turn = (prompt * AFFINITY_TOKENS)[:AFFINITY_TOKENS]
    assert len({first(turn + more, "a", "b", "c") for more in ([], [1], [2, 3] * 50)}) == 1


def test_conversations_spread():
    chosen = [first([number, 7, 7], "a", "b", "c") for number in range(300)]
    assert min(chosen.count(name) for name in "abc") > 60


def test_a_new_worker_takes_from_all_and_moves_nothing_else():
    before = {number: first([number], "a", "b", "c") for number in range(200)}
    after = {number: first([number], "a", "b", "c", "d") for number in range(200)}
    moved = {number for number in before if before[number] != after[number]}
    assert {after[number] for number in moved} == {"d"}
    assert {before[number] for number in moved} == {"a", "b", "c"}
