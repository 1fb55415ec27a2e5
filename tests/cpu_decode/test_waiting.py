from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_decode.waiting import Line, Need, Waiting, steps_until_room
from transfer.errors import CapacityError
from transfer.messages import Reserve, Sampling


def waiting(request_id: str, since_ns: int = 0) -> Waiting:
    reserve = Reserve(request_id=request_id, prompt=[1], sampling=Sampling(max_tokens=1), source="local", deadline_ms=5)
    return Waiting(request_id.encode(), reserve, since_ns)


def test_who_comes_first_is_first_and_who_leaves_is_gone() -> None:
    line = Line(3)
    for request_id in "abc":
        line.join(waiting(request_id))
    with pytest.raises(CapacityError, match="3 requests wait for cells already"):
        line.join(waiting("d"))
    assert (line.client("b"), line.client("d"), len(line), "b" in line) == (b"b", None, 3, True)
    line.leave("a")
    line.leave("a")
    first = line.first()
    assert first is not None
    assert first.reserve.request_id == "b"
    assert [each.reserve.request_id for each in line] == ["b", "c"]


def test_the_deadline_counts_from_when_it_came() -> None:
    assert waiting("a", since_ns=7).deadline_ns == 5_000_007


@pytest.mark.parametrize(
    ("free", "running", "line", "steps"),
    [
        (100, [], [Need(100, 1, 10)], 0),
        (0, [Need(50, 1, 7), Need(50, 1, 3)], [Need(50, 1, 10)], 3),
        (0, [Need(50, 1, 7), Need(50, 1, 3)], [Need(100, 1, 10)], 7),
        # The second waits for the first to end.
        (0, [Need(50, 1, 3)], [Need(50, 1, 10), Need(50, 1, 1)], 13),
        # It never fits.
        (10, [Need(50, 1, 3)], [Need(70, 1, 1)], 0),
    ],
)
def test_room_comes_when_others_end(free: int, running: list[Need], line: list[Need], steps: int) -> None:
    assert steps_until_room(free, 9, running, line) == steps


def test_sequences_are_waited_for_like_cells() -> None:
    assert steps_until_room(1000, 1, [Need(10, 2, 5)], [Need(10, 3, 1)]) == 5


needs = st.builds(Need, st.integers(1, 40), st.integers(1, 3), st.integers(0, 50))


@given(st.lists(needs, max_size=6), st.lists(needs, min_size=1, max_size=6), st.integers(0, 40))
def test_a_longer_line_never_waits_less_and_all_of_it_fits_in_turn(
    running: list[Need], line: list[Need], free: int
) -> None:
    sequences = 18
    cells = 40
    steps = [steps_until_room(free + cells, sequences, running, line[: at + 1]) for at in range(len(line))]
    # Everything fits in 40 cells and 18 sequences, so that it is never impossible.
    assert steps == sorted(steps)
    assert steps[-1] <= max((need.steps for need in running), default=0) + sum(need.steps for need in line)
