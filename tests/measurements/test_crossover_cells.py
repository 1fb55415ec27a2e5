"""Finished runs on disk: a rerun finds its own, and nobody else's."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from measurements.crossover_cells import Cell, Cells, Timed, name_of
from measurements.crossover_plan import OPTIONS, Plan, fitting, full, only, quick
from transfer.errors import ConfigError

COMMIT = "a" * 40


@pytest.fixture
def plan() -> Plan:
    return only(quick(), ["short chat"], [1], 2)


def opened(folder: Path, plan: Plan, commit: str = COMMIT) -> Cells:
    return Cells(folder, commit, plan, plan.fingerprint(["own"]))


def cell(plan: Plan, index: int = 0, **changes: object) -> Cell:
    place = list(plan.places(0))[index]
    request = Timed(began_s=1.0, ttft_s=0.1, e2e_s=0.5, itl_s=[0.1], prompt_tokens=64, output_tokens=24)
    made = Cell(
        commit=COMMIT,
        plan=plan.fingerprint(["own"]),
        turn=place.turn,
        workload=place.load.workload.name,
        concurrency=place.load.concurrency,
        option=place.option,
        requests=[request],
    )
    return msgspec.structs.replace(made, **changes)


def test_what_is_finished_is_found_again(tmp_path: Path, plan: Plan) -> None:
    cells = opened(tmp_path, plan)
    cells.add(cell(plan))
    first, second = list(plan.places(0))[:2]
    for known in (cells, opened(tmp_path, plan)):
        assert known.finished(first)
        assert not known.finished(second)
        assert [each.name for each in known] == [name_of(first)]
        assert not known.problems


def test_what_failed_is_known_and_not_finished(tmp_path: Path, plan: Plan) -> None:
    opened(tmp_path, plan).add(cell(plan, why="the server went away", requests=[]))
    found = opened(tmp_path, plan)
    assert not found.finished(next(plan.places(0)))
    assert [each.why for each in found] == ["the server went away"]


def test_another_commits_run_is_flagged_and_not_counted(tmp_path: Path, plan: Plan) -> None:
    opened(tmp_path, plan).add(cell(plan))
    other = opened(tmp_path, plan, "b" * 40)
    assert list(other) == []
    assert other.problems == [
        f"{name_of(next(plan.places(0)))}.cell.json is left out: it is of commit aaaaaaaaa, this is another"
    ]


def test_another_plans_run_is_flagged_and_not_counted(tmp_path: Path, plan: Plan) -> None:
    opened(tmp_path, plan).add(cell(plan))
    for other in (Cells(tmp_path, COMMIT, plan, plan.fingerprint(["http://elsewhere"])), opened(tmp_path, full())):
        assert list(other) == []
        assert "another plan, stack or model" in other.problems[0]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda built: json.dumps(built)[:-30],
        lambda built: json.dumps(built | {"schema": "isthmus.crossover-cell/2"}),
        lambda built: json.dumps(built | {"requests": [built["requests"][0] | {"ttft_s": float("nan")}]}),
        lambda built: json.dumps(built | {"requests": [built["requests"][0] | {"e2e_s": -1}]}),
        lambda built: json.dumps(built | {"seconds": None}),
    ],
    ids=["cut off", "schema", "NaN", "negative", "null"],
)
def test_spoiled_files_are_flagged_and_not_counted(tmp_path: Path, plan: Plan, spoil) -> None:
    opened(tmp_path, plan).add(cell(plan))
    [file] = tmp_path.glob("*.cell.json")
    file.write_text(spoil(json.loads(file.read_text())))
    found = opened(tmp_path, plan)
    assert list(found) == []
    assert found.problems[0].startswith(f"{file.name} is left out: ")


def test_a_file_under_anothers_name_is_no_result(tmp_path: Path, plan: Plan) -> None:
    opened(tmp_path, plan).add(cell(plan))
    [file] = tmp_path.glob("*.cell.json")
    file.rename(tmp_path / f"{name_of(list(plan.places(0))[1])}.cell.json")
    assert list(opened(tmp_path, plan)) == []


def test_a_folder_that_cannot_be(tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--work"):
        opened(tmp_path / "file" / "x", plan)


def test_rounds_hold_the_same_runs_in_another_order() -> None:
    plan = quick()
    first, second = ([(p.load, p.option) for p in plan.places(turn)] for turn in range(2))
    assert first != second
    assert sorted(map(repr, first)) == sorted(map(repr, second))
    names = {name_of(place) for turn in range(plan.rounds) for place in plan.places(turn)}
    third = [place.load for place in plan.places(2)]
    assert len(names) == 2 * len(first) + len(third)
    assert {load.concurrency for load in third} == {1, 4}


def test_what_is_named_is_kept_and_what_is_unknown_is_refused() -> None:
    assert {load.workload.name for load in only(quick(), ["burst"], [4], None).loads} == {"burst"}
    with pytest.raises(ConfigError, match=r"no workload 'nap'; there are short chat, .*, prompt length"):
        only(quick(), ["nap"], [], None)
    with pytest.raises(ConfigError, match="--concurrency"):
        only(quick(), ["burst"], [3], None)


def test_what_does_not_fit_is_left_out_and_named() -> None:
    plan, notes = fitting(full(), 4095)
    names = ("long document", "prompt length 4096", "prompt length 7000")
    assert notes == [f"left out: {name} does not fit 4095 tokens" for name in names]
    assert max(load.tokens for load in plan.loads) <= 4095
    with pytest.raises(ConfigError, match="max_model_len"):
        fitting(full(), 10)


def test_every_workload_is_served_by_every_option() -> None:
    for plan in (quick(), full()):
        served = {}
        for load in plan.loads:
            served.setdefault(load.workload.name, set()).update(load.options)
        named = {name: options for name, options in served.items() if not name.startswith("prompt length")}
        assert set(named) == {"short chat", "long document", "long output", "shared prefix", "burst"}
        assert all(options == set(OPTIONS) for options in named.values())
    assert {load.concurrency for load in full().loads} == {1, 2, 4, 8, 16, 32}
