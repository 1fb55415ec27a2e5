from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cpu_decode.profile import Tuned
from measurements import decode, decode_tune
from measurements.decode_tune import axes, pick
from measurements.decode_ways import Rate, Setting
from tests.cpu_decode.test_profile import TUNED
from transfer.config import Decode


def test_tuning_keeps_what_is_hardly_worse() -> None:
    others = [TUNED, Tuned(threads=1, batch_threads=1, spin_count=0, huge_pages=True, mmap=True)]
    assert pick(others, [1.0, 1.019]) == others[0]
    assert pick(others, [1.0, 1.021]) == others[1]


def test_candidates_are_compared_with_their_neighbours_in_time() -> None:
    """A machine that gets slower all the time; the second candidate is half as fast with one sequence."""
    paces = iter(1000.0 / turn for turn in range(1, 7) for _ in range(2))
    ratios = decode_tune.in_turns([lambda _: next(paces), lambda count: next(paces) / (2 / count)], (1, 2), 3)
    assert ratios == [{"1 sequences": 1.0, "2 sequences": 1.0}, {"1 sequences": 0.5, "2 sequences": 1.0}]


def test_tuning_says_what_another_shape_for_each_load_would_gain() -> None:
    unified = {"prefill": 1.0, "1 sequences": 1.0, "16 sequences": 1.0}
    streams = {"prefill": 0.5, "1 sequences": 0.8, "16 sequences": 1.6}
    names = ["best cells for 1 sequences over the chosen", "best cells for 16 sequences over the chosen"]
    for chosen, gains in ((0, [1.0, 1.6]), (1, [1.25, 1.0])):
        assert decode_tune.gain_of_switching([unified, streams], chosen) == dict(zip(names, gains, strict=True))


@pytest.mark.parametrize(("gain", "chosen"), [(1.0, "unified"), (1.1, "streams, no flash attention, bf16")])
def test_cells_are_bf16_where_that_is_faster(
    gain: float, chosen: str, default_pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def rate_of(_setting: Setting, cells: Decode) -> Iterator[Rate]:
        yield lambda _count: 10 * gain if cells.cell_type == "bf16" else 10.0

    monkeypatch.setattr(decode_tune, "worker_rate", rate_of)
    setting = decode.setting(default_pair.gguf, "8,16", 60, 24)
    assert decode_tune.fastest_shape(setting) == decode_tune.SHAPES[chosen]


def test_tuning_starts_every_axis_with_what_holds() -> None:
    assert [list(axis) for axis in axes(14, 28) if "threads 14" in axis] == [["threads 14", "threads 28", "threads 7"]]
    assert {"threads 1": {"threads": 1}} in axes(1, 1)
    assert decode_tune.VARIANTS["as the worker"] == ()
