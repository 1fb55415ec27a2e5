"""The simulation of ``measure advise`` against what ``measure crossover`` found on the same machine.

What is simulated is set by single prompts of several lengths and by one workload: each whole engine's time to first
token of lone requests and time per output token at every concurrency, and what a split adds to the first token of a
lone request. All other workloads, at every concurrency and by every way to serve, are predictions; only those count.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from measurements import crossover_numbers as numbers
from measurements.calibrate import FirstToken, StepTime, engine_set
from measurements.crossover_cells import Cell
from measurements.crossover_plan import SWEEP, sweep_workload
from measurements.profiles import Device, LinkSpeed, ModelShape, Setup, codecs, envelope_of, read
from measurements.roofline import prefill_seconds
from measurements.simulate import simulate
from measurements.workloads import Workload
from transfer.errors import ConfigError

# The workload whose time per output token sets the engines: little prompt, much answer.
SETS_DECODING = "long output"
# Issue: predictions should be off by no more than this in the median.
TARGET = 0.15
# What the proxy does for one request before the next: tokenizing and choosing takes some 3 ms in `ledger.json`.
ARRIVAL_MS = 3.0
_WHOLE = ("gpu", "cpu")
_PROFILES = {"gpu": "two-core-vllm", "cpu": "two-core-llama"}
_MODELS = {"SmolLM2-135M-Instruct": "smollm2-135m"}

Point = dict[str, Any]


def validate(model: str, own: bool, workloads: Sequence[Workload], cells: Sequence[Cell]) -> dict[str, Any]:
    """Predictions beside measurements, and the median relative error of TTFT and of tokens/s by architecture.

    ``model`` is the pair's name, ``own`` whether both engines ran on this host's cores. Without the model's shape, or
    what sets the engines, says why there is none under ``why``.
    """
    by_name = {workload.name: workload for workload in workloads}
    grouped = numbers.grouped(cells)
    try:
        setup = calibrated(model, own, by_name, grouped)
    except ConfigError as error:
        return {"why": str(error)}
    found = list(points(setup, by_name, grouped))
    errors: dict[str, Any] = {}
    for option in dict.fromkeys(point["option"] for point in found):
        mine = [point for point in found if point["option"] == option and point["counts"]]
        if mine:
            errors[option] = {
                "points": len(mine),
                **{
                    f"{what}_error_median": statistics.median(abs(point[f"{what}_error"]) for point in mine)
                    for what in ("ttft", "tokens_per_s")
                },
            }
    return {"setup": msgspec.to_builtins(setup), "errors": errors, "points": found}


def calibrated(
    model: str, own: bool, workloads: Mapping[str, Workload], grouped: Mapping[tuple[str, int], Mapping[str, Any]]
) -> Setup:
    """Devices and handoff, set by what :func:`_sets` them; :class:`ConfigError` saying what that lacks."""
    if model not in _MODELS or not own:
        raise ConfigError(f"shape and devices are known of an own stack with {', '.join(_MODELS)} only")
    shape = read(_MODELS[model], ModelShape)
    devices = {}
    for option, profile in _PROFILES.items():
        steps, firsts = [], []
        for (name, concurrency), options in grouped.items():
            rounds = options.get(option)
            if not rounds or name not in workloads:
                continue
            requests = [request for turn in rounds.values() for request in turn]
            workload = workloads[name]
            if _sets(name) and concurrency == 1:
                firsts += [FirstToken(workload.prompt_tokens, each.ttft_s) for each in requests]
            if name == SETS_DECODING:
                context = workload.prompt_tokens + workload.output_tokens // 2
                steps.append(StepTime(concurrency, context, statistics.median(each.tpot_s for each in requests)))
        if len({each.prompt_tokens for each in firsts}) < 2 or not steps:
            raise ConfigError(f"single prompts of two lengths and {SETS_DECODING!r} on {option} are needed to set it")
        devices[option] = engine_set(read(profile, Device), shape, firsts, steps)
    # What a split adds to the first token: what its lone requests took longer than vLLM's own prefill.
    added_s = [
        each.ttft_s - devices["gpu"].request_ms / 1e3 - prefill_seconds(devices["gpu"], shape, each.prompt_tokens)
        for (name, concurrency), options in grouped.items()
        if _sets(name) and concurrency == 1
        for option, rounds in options.items()
        if option.startswith("split")
        for turn in rounds.values()
        for each in turn
    ]
    link = read("loopback", LinkSpeed)
    if added_s:
        link = msgspec.structs.replace(link, handoff_ms=max(statistics.median(added_s), 0.0) * 1e3)
    return Setup(
        gpu=devices["gpu"],
        cpu=devices["cpu"],
        link=link,
        model=shape,
        codecs=codecs(("raw", "q8")),
        shared_cores=True,
        arrival_ms=ARRIVAL_MS,
    )


def points(
    setup: Setup,
    workloads: Mapping[str, Workload],
    grouped: Mapping[tuple[str, int], Mapping[str, Any]],
) -> Iterator[Point]:
    """Every measured load and option beside its simulation; ``counts`` where its workload set nothing."""
    for (name, concurrency), options in sorted(grouped.items()):
        if name not in workloads:
            continue
        workload = workloads[name]
        for option, rounds in options.items():
            if not rounds:
                continue
            requests = [request for turn in rounds.values() for request in turn]
            a_client = max(len(requests) // len(rounds) // concurrency, 1)
            simulated = _simulated(setup, option, workload, concurrency, a_client)
            if simulated is None:
                continue
            point: Point = {"workload": name, "concurrency": concurrency, "option": option}
            measured = {
                "ttft": statistics.median(each.ttft_s for each in requests),
                "tokens_per_s": numbers.tokens_per_s(requests, concurrency),
            }
            for what, seen in measured.items():
                point |= {what: seen, f"{what}_simulated": simulated[what]}
                point[f"{what}_error"] = simulated[what] / seen - 1
            yield point | {"counts": not _sets(name)}


def _sets(name: str) -> bool:
    """Whether the workload sets what is simulated: then nothing of it is a prediction."""
    return name.startswith(SWEEP) or name == SETS_DECODING


def _simulated(
    setup: Setup, option: str, workload: Workload, concurrency: int, a_client: int
) -> dict[str, float] | None:
    architecture, _, codec_name = option.partition(" ")
    codec = next((codec for codec in setup.codecs if codec.name == codec_name), setup.codecs[0])
    run = simulate(setup, architecture, codec, workload, concurrency, a_client)  # type: ignore[arg-type]
    if run is None:
        return None
    # As what was measured is summed up.
    return {
        "ttft": statistics.median(each.ttft_s for each in run.answers),
        "tokens_per_s": concurrency * sum(a.output_tokens for a in run.answers) / sum(a.e2e_s for a in run.answers),
    }


def from_result(path: Path) -> dict[str, Any]:
    """:func:`validate` over a result file of ``measure crossover``; :class:`ConfigError` if it is none."""
    try:
        envelope = envelope_of(path, "crossover")
        if envelope is None:
            raise ConfigError(f"{path} does not exist - at --validate")
        summary = envelope["summary"]
        cells = msgspec.convert([{"commit": "", "plan": ""} | each for each in envelope["samples"]], list[Cell])
        named = [Workload(**made["workload"]) for made in summary["workloads"].values()]
        swept = [sweep_workload(int(tokens)) for tokens in summary.get("prompt_length", {}).get("options", {})]
        stack = summary["stack"]
        return validate(stack["model"], stack["own"], [*named, *swept], cells)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from None


def table(found: dict[str, Any]) -> Table:
    """Errors by architecture for people."""
    shown = Table(title="the simulation against this crossover: median error", title_justify="left")
    for column in ("architecture", "points", "TTFT", "tokens/s", f"within {TARGET:.0%}"):
        shown.add_column(column, justify="left" if column == "architecture" else "right")
    for option, row in found["errors"].items():
        errors = [row["ttft_error_median"], row["tokens_per_s_error_median"]]
        verdict = "yes" if max(errors) <= TARGET else "no"
        shown.add_row(option, str(row["points"]), *(f"{each:.0%}" for each in errors), verdict)
    return shown
