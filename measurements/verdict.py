"""What simulated answers amount to: percentiles, goodput, whether splitting pays, and what would change that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from measurements.profiles import Setup, scaled
from measurements.simulate import ARCHITECTURES, Answer, Run, simulate
from measurements.workloads import Workload

# Gains below this are none: the inputs are not better known.
WORTH = 1.05
FACTORS = (0.5, 1 / 1.5, 1.5, 2.0)
NUMBERS = (
    "gpu.compute_tflops",
    "gpu.memory_gb_per_s",
    "gpu.memory_gib",
    "cpu.compute_tflops",
    "cpu.memory_gb_per_s",
    "link.gbit_per_s",
)

# The router chooses among the others, so it is on neither side of a verdict.
ROUTER = "auto"

Row = dict[str, Any]


class Gain(NamedTuple):
    """The best split against the best of the others; ``ratio`` of goodput, or of tokens/s where neither has any.

    ``ratio`` is None where one of the two has no goodput at all: then only the other one keeps the promise.
    """

    split: str
    other: str
    measure: str
    ratio: float | None
    pays: bool


def options(setup: Setup) -> list[str]:
    """What there is to choose from: the architectures, split once for each codec."""
    return ["gpu", "cpu", "replicated", *(f"split {codec.name}" for codec in setup.codecs), ROUTER]


def outcome(setup: Setup, option: str, workload: Workload, concurrency: int) -> Row | None:
    """One simulation, summed up; None if the workload has no room."""
    codec = next((codec for codec in setup.codecs if option == f"split {codec.name}"), setup.codecs[0])
    architecture = next(each for each in ARCHITECTURES if option.startswith(each))
    run = simulate(setup, architecture, codec, workload, concurrency)
    return None if run is None else summed_up(run, workload)


def summed_up(run: Run, workload: Workload) -> Row:
    """Percentiles over all requests, in seconds; rates per second.

    A rate is the sum of the clients' own: each has as many requests as the others and stops when it has them, so a
    slow client does not make the whole look idle at the end.
    """
    row: Row = {}
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        values = np.percentile([getattr(answer, name) for answer in run.answers], [50, 90, 99])
        row[name] = dict(zip(("p50", "p90", "p99"), map(float, values), strict=True))
    tokens_per_s = goodput_per_s = 0.0
    for _, group in groupby(run.answers, key=lambda answer: answer.client):
        answers = list(group)
        elapsed_s = sum(answer.e2e_s for answer in answers)
        tokens_per_s += sum(answer.output_tokens for answer in answers) / elapsed_s
        goodput_per_s += sum(_is_good(answer, workload) for answer in answers) / elapsed_s
    return row | {"tokens_per_s": tokens_per_s, "goodput_per_s": goodput_per_s, "preemptions": run.preemptions}


def _is_good(answer: Answer, workload: Workload) -> bool:
    return answer.ttft_s <= workload.ttft_slo_s and answer.tpot_s <= workload.tpot_slo_s


def gain(rows: Mapping[str, Row | None]) -> Gain | None:
    """Splitting against the rest, by option; None if either side has no room for the workload."""
    split, other = (_best(_side(rows, is_split)) for is_split in (True, False))
    if split is None or other is None:
        return None
    (split_name, ours), (other_name, theirs) = split, other
    if ours["goodput_per_s"] and theirs["goodput_per_s"]:
        ratio = ours["goodput_per_s"] / theirs["goodput_per_s"]
        return Gain(split_name, other_name, "goodput", ratio, ratio >= WORTH)
    if ours["goodput_per_s"] or theirs["goodput_per_s"]:
        return Gain(split_name, other_name, "goodput", None, bool(ours["goodput_per_s"]))
    ratio = ours["tokens_per_s"] / theirs["tokens_per_s"]
    return Gain(split_name, other_name, "tokens/s", ratio, ratio >= WORTH)


def _side(rows: Mapping[str, Row | None], is_split: bool) -> dict[str, Row]:
    return {name: row for name, row in rows.items() if row and name != ROUTER and name.startswith("split") == is_split}


def _best(rows: Mapping[str, Row]) -> tuple[str, Row] | None:
    return max(rows.items(), key=lambda item: (item[1]["goodput_per_s"], item[1]["tokens_per_s"]), default=None)


def crossover(gains: Mapping[int, Gain | None]) -> int | None:
    """The smallest concurrency from which on splitting pays, up to the largest; None if there is none."""
    found = None
    for concurrency in sorted(gains, reverse=True):
        each = gains[concurrency]
        if each is None or not each.pays:
            break
        found = concurrency
    return found


def sentence(gains: Mapping[int, Gain | None]) -> str:
    """The verdict for people."""
    known = {concurrency: each for concurrency, each in gains.items() if each}
    if not known:
        return "no verdict: the model and its KV do not fit"
    paying = [concurrency for concurrency, each in known.items() if each.pays]
    if not paying:
        concurrency, best = best_case(known)
        return f"don't split: {_versus(best)} at {concurrency} requests, its best case"
    names = ", ".join(map(str, paying))
    return f"split at {names} concurrent requests: {_versus(known[paying[-1]])} at {paying[-1]}"


def best_case(gains: Mapping[int, Gain]) -> tuple[int, Gain]:
    """Where splitting looks best."""
    return max(gains.items(), key=lambda item: (item[1].pays, item[1].ratio or 0.0))


def _versus(each: Gain) -> str:
    if each.ratio is None:
        meets, misses = (each.split, each.other) if each.pays else (each.other, each.split)
        return f"only {meets} keeps the SLO, {misses} never does"
    return f"{each.split} has x{each.ratio:.2f} the {each.measure} of {each.other}"


def sensitivity(
    setup: Setup, workload: Workload, concurrency: int, pays: bool, done: Callable[[], None]
) -> Iterator[Row]:
    """The numbers that, changed by the smallest factor that does it, turn the verdict; each with its new gain.

    ``done`` is called after every number.
    """
    near = contenders({option: outcome(setup, option, workload, concurrency) for option in options(setup)})
    better, worse = sorted(f for f in FACTORS if f > 1), sorted((f for f in FACTORS if f < 1), reverse=True)
    for number in NUMBERS:
        for factors in (better, worse):
            for factor in factors:
                other = scaled(setup, number, factor)
                found = gain({option: outcome(other, option, workload, concurrency) for option in near})
                if found and found.pays != pays:
                    yield {"number": number, "factor": factor, "concurrency": concurrency} | found._asdict()
                    break
        done()


def contenders(rows: Mapping[str, Row | None]) -> list[str]:
    """The options that are not too far behind the best of their side to overtake it, whatever number changes by two."""
    near = []
    for is_split in (True, False):
        side = {name: row["tokens_per_s"] for name, row in _side(rows, is_split).items()}
        near += [name for name, rate in side.items() if rate * max(FACTORS) >= max(side.values())]
    return near
