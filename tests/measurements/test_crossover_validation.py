"""Engines set by measurements, and whether predictions for what was simulated in the first place come out."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from isthmus.cli import cli
from measurements import calibrate, crossover_validation
from measurements.calibrate import FirstToken, StepTime, engine_set, prefill_set
from measurements.crossover_cells import Cell, Timed
from measurements.crossover_plan import Plan, only, quick
from measurements.profiles import Device, LinkSpeed, ModelShape, Setup, codecs, read
from measurements.roofline import prefill_seconds, step_seconds
from measurements.simulate import simulate
from transfer.errors import ConfigError

MODEL = read("smollm2-135m", ModelShape)
PAIR = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def truth() -> Setup:
    """A host whose numbers the calibration must find."""
    gpu = msgspec.structs.replace(
        read("two-core-vllm", Device), compute_efficiency=0.2, sequence_ms=2.0, step_overhead_ms=20.0, request_ms=15.0
    )
    cpu = msgspec.structs.replace(read("two-core-llama", Device), compute_efficiency=0.1, sequence_ms=1.5)
    return Setup(
        gpu=gpu,
        cpu=cpu,
        link=msgspec.structs.replace(read("loopback", LinkSpeed), handoff_ms=30.0),
        model=MODEL,
        codecs=codecs(["raw", "q8"]),
        shared_cores=True,
        arrival_ms=crossover_validation.ARRIVAL_MS,
    )


@pytest.fixture(scope="module")
def plan() -> Plan:
    return only(quick(), ["long output", "short chat", "prompt length"], [1, 4], 1)


def cells_of(setup: Setup, plan: Plan, slower: float = 1.0) -> list[Cell]:
    """What a crossover on a host that is exactly ``setup`` would have found; replicas ``slower`` than that."""
    cells = []
    for place in plan.places(0):
        load, workload = place.load, place.load.workload
        architecture, _, name = place.option.partition(" ")
        codec = next((codec for codec in setup.codecs if codec.name == name), setup.codecs[0])
        run = simulate(setup, architecture, codec, workload, load.concurrency, load.requests // load.concurrency)
        factor = slower if architecture == "replicated" else 1.0
        requests = [
            Timed(
                began_s=0,
                ttft_s=answer.ttft_s * factor,
                e2e_s=answer.e2e_s * factor,
                prompt_tokens=workload.prompt_tokens,
                output_tokens=answer.output_tokens,
            )
            for answer in run.answers
        ]
        about = {"turn": 0, "workload": workload.name, "concurrency": load.concurrency, "option": place.option}
        cells.append(Cell(commit="", plan="", requests=requests, **about))
    return cells


def test_a_device_is_found_from_its_own_times() -> None:
    true = msgspec.structs.replace(read("two-core-vllm", Device), compute_efficiency=0.15, sequence_ms=3.0)
    steps = [StepTime(n, 100, step_seconds(true, MODEL, [100] * n, [])) for n in (1, 4, 16)]
    other = msgspec.structs.replace(true, sequence_ms=0.0, step_overhead_ms=1.0, compute_efficiency=0.5)
    seen = [FirstToken(tokens, 0.01 + prefill_seconds(true, MODEL, tokens)) for tokens in (128, 256, 512, 1024, 2000)]
    # Something else held one of them up.
    seen.append(FirstToken(128, 1.0))
    found = engine_set(other, MODEL, seen, steps)
    assert found.sequence_ms == pytest.approx(true.sequence_ms, rel=0.05)
    assert found.step_overhead_ms == pytest.approx(true.step_overhead_ms, rel=0.05)
    assert found.compute_tflops * found.compute_efficiency == pytest.approx(0.95 * 0.15, rel=0.05)
    assert found.request_ms == pytest.approx(10, abs=2)


def test_one_number_is_not_enough() -> None:
    with pytest.raises(ConfigError, match="two lengths"):
        prefill_set(read("two-core-vllm", Device), MODEL, [FirstToken(128, 0.2)] * 2)


def test_what_was_simulated_is_predicted(truth: Setup, plan: Plan) -> None:
    cells = cells_of(truth, plan)
    found = crossover_validation.validate(PAIR, True, [load.workload for load in plan.loads], cells)
    assert set(found["errors"]) == {"gpu", "cpu", "replicated", "split raw", "split q8", "auto"}
    for option, row in found["errors"].items():
        # Where two routes are about equal, the router may take the other one.
        largest = crossover_validation.TARGET if option == "auto" else 0.1
        assert row["ttft_error_median"] < largest, (option, row)
        assert row["tokens_per_s_error_median"] < largest, (option, row)
    counted = [point for point in found["points"] if point["counts"]]
    assert {point["workload"] for point in counted} == {"short chat"}


def test_what_a_split_adds_is_found_from_lone_requests(truth: Setup, plan: Plan) -> None:
    cells = cells_of(truth, plan)
    found = crossover_validation.validate(PAIR, True, [load.workload for load in plan.loads], cells)
    assert found["setup"]["link"]["handoff_ms"] == pytest.approx(30, abs=5)


def test_a_prediction_that_is_off_is_said_to_be(truth: Setup, plan: Plan) -> None:
    cells = cells_of(truth, plan, slower=2.0)
    errors = crossover_validation.validate(PAIR, True, [load.workload for load in plan.loads], cells)["errors"]
    assert errors["replicated"]["ttft_error_median"] == pytest.approx(0.5, abs=0.1)
    assert errors["gpu"]["ttft_error_median"] < 0.1


def test_what_is_not_known_is_said(truth: Setup, plan: Plan) -> None:
    cells = cells_of(truth, plan)
    workloads = [load.workload for load in plan.loads]
    assert "of an own stack" in crossover_validation.validate("another", True, workloads, cells)["why"]
    assert "of an own stack" in crossover_validation.validate(PAIR, False, workloads, cells)["why"]
    without = [cell for cell in cells if cell.option != "gpu"]
    assert "on gpu are needed" in crossover_validation.validate(PAIR, True, workloads, without)["why"]


def test_the_command_reads_a_result(truth: Setup, plan: Plan, tmp_path: Path) -> None:
    from measurements import crossover_summary, result
    from measurements.crossover import sample

    cells = cells_of(truth, plan)
    summary = crossover_summary.summarize(plan, cells) | {"stack": {"model": PAIR, "own": True}}
    path = tmp_path / "crossover.json"
    result.write(path, "crossover", {}, [sample(cell) for cell in cells], summary)
    argv = ["measure", "advise", "--validate", str(path), "--json", str(tmp_path / "v.json")]
    done = CliRunner().invoke(cli, argv, catch_exceptions=False)
    assert done.exit_code == 0
    assert "split q8" in done.output
    written = json.loads((tmp_path / "v.json").read_text())
    assert written["summary"]["errors"]["auto"]["points"] == 2
    with pytest.raises(ConfigError, match="not a result of `isthmus measure crossover`"):
        crossover_validation.from_result(tmp_path / "v.json")


def test_results_of_the_components_set_the_engines(truth: Setup, tmp_path: Path) -> None:
    rates = {str(n): {"vLLM alone": n / prefill_seconds(truth.gpu, MODEL, n)} for n in (128, 900)}
    steps = {str(n): n / step_seconds(truth.cpu, MODEL, [900] * n, []) for n in (1, 8)}
    ways = {"llama-batched-bench": {"1": 1.0, "8": 2.0}, "isthmus": steps}
    for measure, summary in (("prefill", {"tokens_per_s": rates}), ("decode", {"tokens_per_s": ways})):
        samples = [{"what": "memory", "context_tokens": 900}]
        envelope = {"schema": "isthmus.measure/1", "measure": measure, "samples": samples, "summary": summary}
        (tmp_path / f"{measure}.json").write_text(json.dumps(envelope))
    shipped = msgspec.structs.replace(
        truth, gpu=read("two-core-vllm", Device), cpu=msgspec.structs.replace(truth.cpu, sequence_ms=9.0)
    )
    found = calibrate.with_engines(shipped, tmp_path)
    assert found.gpu.compute_tflops * found.gpu.compute_efficiency == pytest.approx(0.95 * 0.2, rel=0.1)
    assert found.cpu.sequence_ms == pytest.approx(truth.cpu.sequence_ms, rel=0.05)
