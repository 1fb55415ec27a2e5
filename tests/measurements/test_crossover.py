"""The whole measurement with engines and generator stood in for: what is run, resumed, flagged and concluded."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest

from measurements import crossover, crossover_plan, result
from measurements.crossover import Where
from measurements.crossover_plan import REPLICATED, Plan
from measurements.load_generator import Ask, Request, Target
from transfer.config import Pair
from transfer.errors import EngineError, LinkError

COMMIT = "c" * 40
# Seconds a request takes by route, and by codec where it is split.
SECONDS = {"gpu": 2.0, "cpu": 3.0, "": 2.5, "split": 1.0, "auto": 1.1}


class World:
    """A stack and a generator whose requests take as long as ``seconds`` says; ``fail`` may raise before a run."""

    def __init__(self) -> None:
        self.asked: list[Ask] = []
        self.seconds = dict(SECONDS)
        self.fail: Any = lambda _: None
        self.alive = True
        self.stacks = 0

    def stack(self, *_: Any) -> World:
        self.stacks += 1
        self.alive = True
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def target(self, option: str) -> Target:
        return Target("http://replicated" if option == REPLICATED else "http://proxy", "m", "/tokenizer")

    def require_alive(self) -> None:
        if not self.alive:
            raise EngineError("prefill died with SIGKILL")

    def run(self, target: Target, ask: Ask, _saved: Path, _deadline_s: float) -> list[Request]:
        if ask.output_tokens == crossover.WARM_UP.output_tokens:
            return []
        self.asked.append(ask)
        self.fail(len(self.asked))
        route = next((h.partition("=")[2] for h in ask.headers if h.startswith("X-Isthmus-Route")), "")
        assert (route == "") == (target.url == "http://replicated")
        e2e_s = self.seconds[route] * (1 + 0.01 * (len(self.asked) % 3))
        return [
            Request(0.0, e2e_s / 4, e2e_s, [0.01], ask.prompt_tokens, ask.output_tokens) for _ in range(ask.requests)
        ]


@pytest.fixture(autouse=True)
def logs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The logs of a run that fails are left where they are."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World()
    monkeypatch.setattr(crossover, "OwnStack", made.stack)
    monkeypatch.setattr(crossover, "RunningStack", made.stack)
    monkeypatch.setattr(crossover, "Generator", lambda *_: made)
    about = result.environment()
    monkeypatch.setattr(result, "environment", lambda: about | {"commit": COMMIT})
    yield made


@pytest.fixture
def plan() -> Plan:
    return crossover_plan.only(crossover_plan.quick(), ["short chat", "prompt length"], [1, 4], 2)


@pytest.fixture
def where() -> Where:
    pair = Pair(name="m", hf_dir="/tokenizer", gguf="/m.gguf")
    return Where(crossover.cluster_for(crossover_plan.quick(), pair))


def outcome(folder: Path, plan: Plan, where: Where, plot: Path | None = None) -> dict[str, Any]:
    crossover.run(plan, where, folder / "work", folder / "c.json", plot)
    envelope: dict[str, Any] = json.loads((folder / "c.json").read_text())
    return envelope


def test_a_whole_run(world: World, plan: Plan, where: Where, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    envelope = outcome(tmp_path, plan, where, tmp_path / "c.svg")
    assert (envelope["schema"], envelope["measure"]) == ("isthmus.measure/1", "crossover")
    summary = envelope["summary"]
    assert summary["verdict"] == {"short chat": "split"}
    gain = summary["workloads"]["short chat"]["gain"]["4"]
    assert (gain["other"], gain["word"]) == ("gpu", "split")
    assert gain["ratio"] == pytest.approx(2, rel=0.05)
    assert summary["crossover_concurrency"] == {"short chat": []}
    assert summary["prompt_length"]["verdict"] == "split"
    row = summary["workloads"]["short chat"]["options"]["replicated"]["1"]
    assert {"ttft_s", "tpot_s", "itl_s", "e2e_s", "tokens_per_s", "goodput_per_s", "energy_j_per_token"} <= row.keys()
    assert summary["problems"] == []
    assert "shape and devices are known of" in summary["validation"]["why"]
    per_round = 2 * 6 + 4 * 4
    assert len(envelope["samples"]) == len(world.asked) == 2 * per_round
    assert len({ask.seed for ask in world.asked}) == len(world.asked)
    assert "split q8" in (tmp_path / "c.svg").read_text()
    printed = capsys.readouterr().out
    assert "short chat: split: x2.0" in printed
    assert "no crossover, splitting is ahead at every point measured" in printed


def test_where_a_whole_engine_is_better_it_says_so(
    world: World, plan: Plan, where: Where, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    world.seconds["split"] = 4.0
    assert outcome(tmp_path, plan, where)["summary"]["verdict"] == {"short chat": "do not split"}
    assert "short chat: do not split: x0.5" in capsys.readouterr().out


def test_an_interrupted_run_goes_on(world: World, plan: Plan, where: Where, tmp_path: Path) -> None:
    def interrupt(number: int) -> None:
        if number == 10:
            raise KeyboardInterrupt

    world.fail = interrupt
    with pytest.raises(KeyboardInterrupt):
        outcome(tmp_path, plan, where)
    assert not (tmp_path / "c.json").exists()
    world.fail, done = (lambda _: None), len(world.asked)
    envelope = outcome(tmp_path, plan, where)
    assert len(world.asked) - done == 56 - 9
    assert len(envelope["samples"]) == 56
    assert envelope["summary"]["problems"] == []
    # Nothing is left to do: no stack is brought up.
    stacks = world.stacks
    outcome(tmp_path, plan, where)
    assert world.stacks == stacks


def test_a_run_that_failed_is_flagged_left_out_and_tried_again(
    world: World, plan: Plan, where: Where, tmp_path: Path
) -> None:
    def fail(number: int) -> None:
        if number == 3:
            raise EngineError("1 of 2 requests failed: ServerDisconnectedError")

    world.fail = fail
    summary = outcome(tmp_path, plan, where)["summary"]
    said, lacks, *_ = summary["problems"]
    assert said.startswith("not counted: ")
    assert said.endswith("round 1: 1 of 2 requests failed: ServerDisconnectedError")
    assert lacks == "round 1 lacks 1 of 28 runs"
    world.fail, done = (lambda _: None), len(world.asked)
    assert outcome(tmp_path, plan, where)["summary"]["problems"] == []
    assert len(world.asked) - done == 1


def test_a_stack_that_dies_half_way_is_brought_up_again(world: World, plan: Plan, where: Where, tmp_path: Path) -> None:
    def die(number: int) -> None:
        if number == 5:
            world.alive = False
            raise EngineError("2 of 2 requests failed: ClientConnectorError")

    world.fail = die
    envelope = outcome(tmp_path, plan, where)
    assert world.stacks == 2
    assert envelope["summary"]["problems"] == ["the stack was brought up again: prefill died with SIGKILL"]
    assert len(envelope["samples"]) == 56


def test_a_server_elsewhere_that_goes_away_leaves_what_was_measured(
    world: World, plan: Plan, where: Where, tmp_path: Path
) -> None:
    def die(number: int) -> None:
        if number > 20:
            world.alive = False
            raise EngineError("2 of 2 requests failed: ClientConnectorError")

    world.fail = die
    there = where._replace(url="http://proxy")
    with pytest.raises(EngineError, match="prefill died"):
        outcome(tmp_path, plan, there)
    summary = json.loads((tmp_path / "c.json").read_text())["summary"]
    assert "ended early: prefill died with SIGKILL" in summary["problems"]
    assert any(problem.endswith("ClientConnectorError") for problem in summary["problems"])
    assert "replicated" not in summary["workloads"]["short chat"]["options"]
    assert world.stacks == 1


@pytest.mark.usefixtures("world")
def test_runs_of_another_commit_are_flagged_and_never_averaged_in(plan: Plan, where: Where, tmp_path: Path) -> None:
    outcome(tmp_path, plan, where)
    for file in (tmp_path / "work").glob("*.cell.json"):
        built = json.loads(file.read_text())
        slow = [request | {"e2e_s": 1000.0} for request in built["requests"]]
        file.write_bytes(msgspec.json.encode(built | {"commit": "d" * 40, "requests": slow}))
    envelope = outcome(tmp_path, plan, where)
    problems = envelope["summary"]["problems"]
    assert len(problems) == 56
    assert all("is left out: it is of commit ddddddddd, this is another" in problem for problem in problems)
    assert all(request["e2e_s"] < 10 for sample in envelope["samples"] for request in sample["requests"])


@pytest.mark.usefixtures("world")
def test_rounds_end_with_the_time(plan: Plan, where: Where, tmp_path: Path) -> None:
    summary = outcome(tmp_path, plan._replace(minutes=0.0), where)["summary"]
    assert summary["problems"][:2] == [
        "no time was left for round 2 within 0 minutes",
        "1 of 2 rounds were measured",
    ]


def test_rounds_that_disagree_are_flagged(world: World, plan: Plan, where: Where, tmp_path: Path) -> None:
    def slower(number: int) -> None:
        world.seconds["cpu"] = 3.0 if number <= 28 else 6.0

    world.fail = slower
    problems = outcome(tmp_path, plan, where)["summary"]["problems"]
    assert {problem.partition(":")[0] for problem in problems} == {
        *(f"cpu, short chat at {at}" for at in (1, 4)),
        *(f"cpu, prompt length {tokens} at 1" for tokens in (32, 128, 512, 1024)),
    }
    assert all("the fastest round has x" in problem for problem in problems)


def test_nothing_counted_is_an_error(world: World, plan: Plan, where: Where, tmp_path: Path) -> None:
    def fail(_: int) -> None:
        raise EngineError("400 Bad Request")

    world.fail = fail
    with pytest.raises(EngineError, match="no run counted: 400 Bad Request"):
        outcome(tmp_path, plan, where)


def test_a_proxy_that_is_not_there(plan: Plan, where: Where, tmp_path: Path) -> None:
    there = where._replace(url="http://127.0.0.1:9")
    with pytest.raises(LinkError, match="does not answer"):
        outcome(tmp_path, plan, there)
