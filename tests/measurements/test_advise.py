from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from isthmus.cli import cli
from measurements import advise, verdict
from measurements.simulate import Answer, Run
from measurements.verdict import Gain, contenders, crossover, gain, sentence, summed_up
from measurements.workloads import Workload
from transfer.errors import ConfigError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes for one workload at few concurrencies."""
    folder = tmp_path_factory.mktemp("advise")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advise, "CONCURRENCIES", (1, 8))
        arguments = ["measure", "advise", "--workload", "long document", "--set", "link.gbit_per_s=25"]
        files = ["--json", str(folder / "a.json"), "--plot", str(folder / "a.svg")]
        result = CliRunner().invoke(cli, [*arguments, *files], catch_exceptions=False)
    assert result.exit_code == 0
    (folder / "printed").write_text(result.output)
    return folder


def test_a_run_has_every_option_and_a_verdict(written: Path) -> None:
    envelope = json.loads((written / "a.json").read_text())
    assert (envelope["schema"], envelope["measure"]) == ("isthmus.measure/1", "advise")
    places = [(s["workload"], s["option"], s["concurrency"]) for s in envelope["samples"]]
    options = ("gpu", "cpu", "replicated", "split raw", "split q8", "auto")
    assert places == [("long document", option, concurrency) for concurrency in (1, 8) for option in options]
    summary = envelope["summary"]
    assert summary["setup"]["link"]["gbit_per_s"] == 25
    assert set(summary["workloads"]) == {"long document"}
    found = summary["workloads"]["long document"]
    assert found["verdict"].startswith(("split at", "don't split"))
    assert {"gain", "crossover_concurrency", "sensitivity"} <= found.keys()
    assert 0 < summary["validation_error_median"] < 0.15
    assert "split q8" in (written / "a.svg").read_text()
    assert "simulation" in (written / "printed").read_text()


def test_numbers_that_turn_the_verdict_turn_it(written: Path) -> None:
    found = json.loads((written / "a.json").read_text())["summary"]["workloads"]["long document"]
    pays = any(each["pays"] for each in found["gain"].values())
    assert found["sensitivity"]
    assert all(flip["pays"] != pays for flip in found["sensitivity"])


def test_validation_alone(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli, ["measure", "advise", "--validate", "--json", str(tmp_path / "v.json")], catch_exceptions=False
    )
    assert "10 numbers count" in result.output
    samples = json.loads((tmp_path / "v.json").read_text())["samples"]
    assert {sample["counts"] for sample in samples} == {True, False}


def test_an_unknown_workload_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no workload 'nap'; there are short chat, long document"):
        advise.choose(["nap"])


WORKLOAD = Workload("w", 10, 10, ttft_slo_s=1.0, tpot_slo_s=0.1)


def test_rates_are_the_clients_own() -> None:
    good, late = Answer(0, 0.5, 0.05, 2.0, 10), Answer(0, 3.0, 0.05, 8.0, 10)
    slow = Answer(1, 0.5, 0.2, 20.0, 10)
    row = summed_up(Run([good, late, slow], 3), WORKLOAD)
    assert row["tokens_per_s"] == pytest.approx(20 / 10 + 10 / 20)
    assert row["goodput_per_s"] == pytest.approx(1 / 10)
    assert row["ttft_s"]["p50"] == 0.5
    assert row["preemptions"] == 3


def row(goodput: float, tokens: float) -> dict:
    return {"goodput_per_s": goodput, "tokens_per_s": tokens}


@pytest.mark.parametrize(
    ("gpu", "split", "ratio", "pays"),
    [
        (row(2, 9), row(3, 1), 1.5, True),
        (row(2, 9), row(2.05, 1), 1.025, False),
        (row(0, 9), row(1, 1), None, True),
        (row(1, 9), row(0, 99), None, False),
        (row(0, 10), row(0, 20), 2.0, True),
    ],
    ids=["more", "no more than noise", "only split", "only gpu", "neither, by tokens"],
)
def test_gain(gpu: dict, split: dict, ratio: float | None, pays: bool) -> None:
    found = gain({"gpu": gpu, "cpu": row(0, 1), "replicated": None, "split raw": row(0, 0.5), "split q8": split})
    assert found is not None
    assert (found.split, found.other) == ("split q8", "gpu")
    assert (found.ratio and pytest.approx(ratio), found.pays) == (ratio, pays)


def test_no_gain_without_room() -> None:
    assert gain({"gpu": None, "cpu": None, "split raw": row(1, 1)}) is None
    assert gain({"gpu": row(1, 1), "split raw": None}) is None
    # The router is on neither side.
    assert gain({"auto": row(9, 9), "split raw": row(1, 1)}) is None
    assert sentence({1: None}) == "no verdict: the model and its KV do not fit"


def pays(does: bool) -> Gain:
    return Gain("split raw", "gpu", "goodput", 2.0 if does else 0.5, does)


def test_a_crossover_is_where_it_begins_to_pay_for_good() -> None:
    assert crossover({1: pays(False), 2: pays(True), 4: pays(True)}) == 2
    assert crossover({1: pays(True), 2: pays(False), 4: pays(True)}) == 4
    assert crossover({1: pays(True), 2: pays(False)}) is None
    assert crossover({1: pays(True), 2: None}) is None


def test_sentences() -> None:
    assert sentence({1: pays(False), 8: pays(True)}) == (
        "split at 8 concurrent requests: split raw has x2.00 the goodput of gpu at 8"
    )
    assert sentence({1: pays(False)}).startswith("don't split: split raw has x0.50")
    only = Gain("split raw", "gpu", "goodput", None, False)
    assert "only gpu keeps the SLO" in sentence({1: only})


def test_who_cannot_catch_up_is_left_out() -> None:
    rows = {"gpu": row(0, 10), "cpu": row(0, 4), "replicated": row(0, 6), "split raw": row(0, 1), "split q8": None}
    assert contenders(rows) == ["split raw", "gpu", "replicated"]
    assert max(verdict.FACTORS) == 2
