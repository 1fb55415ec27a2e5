"""How fast the decode worker is against llama.cpp's own programs and the machine's memory, and what disturbs it."""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import cpu_decode.profile
from cpu_decode.geometry import read_geometry
from measurements import bandwidth, decode_latency, decode_speculation, decode_tune, result, targets
from measurements.calibrate import OUR_WORKER
from measurements.decode_latency import Load
from measurements.decode_targets import verdicts
from measurements.decode_ways import STARTS, Rate, Setting, bench_rate, server_rate, turns, worker_rate
from measurements.decode_worker import LiveWorker, live_worker
from measurements.llama_tools import Tools, tools
from transfer.config import Decode
from transfer.errors import ConfigError

Sample = dict[str, Any]

OURS, TUNED = OUR_WORKER, f"{OUR_WORKER}, tuned"
# As llama.cpp's programs are, which have no flag for huge ones.
SMALL_PAGES = f"{OUR_WORKER}, small pages"
BENCH, SERVER = "llama-batched-bench", "llama-server"
# As it comes, with few slots for all; and as it decodes most, with one for every sequence.
DEFAULT, DEFAULT_SLOTS = "llama-server, defaults", "llama-server, defaults and slots for all"
LOAD = Load()
MAX_SEQUENCES = 200
Ways = dict[str, Callable[[], AbstractContextManager[Rate]]]


class Plan(NamedTuple):
    """How much is measured: for a look at whether anything is wrong, or for figures to show."""

    rounds: int
    sequences: str
    context_tokens: int
    new_tokens: int


# The second takes 46 to 80 minutes on two cores of a shared host: most of it are prefills of llama.cpp's programs.
QUICK = Plan(rounds=1, sequences="1,4,16", context_tokens=300, new_tokens=32)
FULL = Plan(rounds=2, sequences="1,2,4,8,16", context_tokens=900, new_tokens=64)
# Whose tokens/s are set against whose, by the name of the ratio.
RATIOS = {
    "vs_batched_bench": (OURS, BENCH),
    "vs_llama_server": (OURS, SERVER),
    "small_pages_vs_batched_bench": (SMALL_PAGES, BENCH),
    "small_pages_vs_llama_server": (SMALL_PAGES, SERVER),
    "tuned_vs_llama_server_default": (TUNED, DEFAULT),
    "tuned_vs_llama_server_slots": (TUNED, DEFAULT_SLOTS),
}


def setting(gguf: Path | None, sequences: str, context_tokens: int, new_tokens: int) -> Setting:
    """What is measured, from the command line; :class:`ConfigError` if it makes no sense."""
    from cpu_decode.service import usable_cores

    counts = sequence_counts(sequences)
    if gguf is None:
        from isthmus.pair import default_pair

        gguf = Path(default_pair().gguf)
    elif not gguf.is_file():
        raise ConfigError(f"{gguf} does not exist - at --gguf")
    return Setting(
        gguf=gguf,
        threads=usable_cores(),
        context_tokens=context_tokens,
        new_tokens=new_tokens,
        sequences=counts,
        num_cells=max(counts[-1] * (context_tokens + new_tokens), LOAD.cells(context_tokens)),
        max_sequences=max(counts[-1], LOAD.sequences) + 1,
    )


def sequence_counts(sequences: str) -> tuple[int, ...]:
    """The numbers in a list such as ``1,2,4``; :class:`ConfigError` if it makes no sense."""
    try:
        counts = tuple(map(int, sequences.split(",")))
    except ValueError:
        counts = ()
    if not counts or list(counts) != sorted(set(counts)) or not 1 <= counts[0] <= counts[-1] <= MAX_SEQUENCES:
        raise ConfigError(f"{sequences!r} is not a list of ascending numbers up to {MAX_SEQUENCES} - at --sequences")
    return counts


def stay_on_one_node() -> None:
    """Bind this process, and the programs that it starts, to one NUMA node where there are several, as a worker is."""
    from cpu_decode import binding, numa

    if nodes := numa.choose("auto", numa.read_topology()):
        binding.bind(nodes[0])


def run(json: Path | None, plot: Path | None, rounds: int, setting: Setting, profile: str) -> None:
    """Measure; print a table, write ``json`` and draw ``plot`` if given. ``profile`` is for the tuned worker.

    Raises :class:`ConfigError` where there is no compiler for llama.cpp's programs and for files that cannot be
    written, :class:`EngineError` if a program fails.
    """
    if plot is not None:
        # Fail before measuring, not after.
        import matplotlib as _  # noqa: F401
    # The same: building llama.cpp's programs takes minutes.
    read_geometry(setting.gguf)
    cpu_decode.profile.apply(Decode(profile=profile))
    console = Console(stderr=True)
    programs = tools(console)
    environment = result.environment()
    samples = []
    with Progress(console=console) as progress:
        task = progress.add_task("decode", total=None)
        for sample in measure(setting, programs, rounds, profile):
            samples.append(sample)
            progress.update(task, advance=1, description=f"decode: {describe(sample)}")
    summary = summarize(samples)
    if json is not None:
        result.write(json, "decode", environment, samples, summary)
    if plot is not None:
        from measurements.decode_plot import draw

        draw(summary, plot)
    Console().print(table(summary))
    Console().print(targets.table(verdicts(summary)))


def measure(setting: Setting, programs: Tools, rounds: int, profile: str) -> Iterator[Sample]:
    """All samples: throughput by every way in turns; then latency, memory and guessing."""
    few = setting._replace(
        sequences=tuple(n for n in setting.sequences if n >= LOAD.sequences) or setting.sequences[-1:]
    )
    tuned = tuned_decode(few, profile)
    shape = cpu_decode.profile.apply(tuned)
    yield {
        "what": "tuned",
        "round": 0,
        "profile": bool(profile),
        "cell_layout": shape.cell_layout,
        "flash_attention": shape.flash_attention,
        "cell_type": shape.cell_type,
    }
    best: Ways = {
        TUNED: lambda: worker_rate(few, tuned, whole=True),
        DEFAULT: lambda: server_rate(few, programs, defaults=True, slot_for_each=False),
        DEFAULT_SLOTS: lambda: server_rate(few, programs, defaults=True),
    }
    for turn in range(rounds):
        yield {
            "what": "bandwidth",
            "round": turn,
            "triad_gb_per_s": bandwidth.triad_gb_per_s(setting.threads),
            "read_gb_per_s": bandwidth.read_gb_per_s(setting.threads),
        }
        for sample in itertools.chain(rates(setting, alike(setting, programs)), rates(few, best)):
            yield sample | {"round": turn}
        yield from latency(setting, LOAD, turn)
        yield from decode_speculation.measure(setting, turn)


def alike(setting: Setting, programs: Tools) -> Ways:
    """Those that are told the same. Our worker is up as it comes, in huge pages, and in small ones."""
    return {
        BENCH: lambda: bench_rate(setting, programs, turns(setting.sequences)),
        OURS: lambda: worker_rate(setting, setting.decode),
        SMALL_PAGES: lambda: worker_rate(setting, msgspec.structs.replace(setting.decode, huge_pages=False)),
        SERVER: lambda: server_rate(setting, programs),
    }


def rates(setting: Setting, ways: Ways) -> Iterator[Sample]:
    """Throughput by each way, which are all up: for each number of sequences in turns, one computing at a time."""
    for begun in range(STARTS):
        # No way is at the same place in every turn, nor with a number of sequences at every start: whoever comes later
        # may find another machine.
        order = deque(ways)
        order.rotate(begun)
        with ExitStack() as up:
            rate = {way: up.enter_context(start()) for way, start in ways.items()}
            for turn, count in enumerate(turns(setting.sequences)):
                for way in order:
                    tokens_per_s = rate[way](count)
                    yield {
                        "what": "rate",
                        "way": way,
                        "start": begun,
                        "turn": turn,
                        "sequences": count,
                        "tokens_per_s": tokens_per_s,
                    }
                order.rotate()


def tuned_decode(setting: Setting, profile: str) -> Decode:
    """What ``profile`` says, or else the defaults with cells in the shape that is fastest for so many sequences."""
    changes = {"profile": profile} if profile else decode_tune.fastest_shape(setting)
    return msgspec.structs.replace(setting.decode, **changes)


def latency(setting: Setting, load: Load, turn: int) -> Iterator[Sample]:
    """Gaps, time to logits and memory of a worker of its own."""
    with live_worker(setting.gguf, setting.decode) as worker:
        for sample in itertools.chain(
            decode_latency.to_logits(worker, load),
            decode_latency.handoffs(worker, setting, load),
            decode_latency.local_prefill(worker, setting, load),
        ):
            yield sample | {"round": turn}
        yield memory(worker, setting) | {"round": turn}


def memory(worker: LiveWorker, setting: Setting) -> Sample:
    """What ``worker`` has in RAM, and what of it are weights and cells."""
    geometry = worker.geometry
    return {
        "what": "memory",
        "resident_bytes": worker.process.memory_info().rss,
        "weights_bytes": setting.gguf.stat().st_size,
        "cells_bytes": setting.num_cells * 2 * geometry.elements_per_token,
        "cell_bytes": 2 * geometry.elements_per_token,
        "context_tokens": setting.context_tokens + setting.new_tokens // 2,
    }


def summarize(samples: list[Sample]) -> dict[str, Any]:
    """Plain numbers; ratios are taken between neighbours in time and their medians reported."""
    # By way, number of sequences and round: a rate for each turn.
    found: dict[tuple[str, int, int], list[float]] = {}
    for s in samples:
        if s["what"] == "rate":
            found.setdefault((s["way"], s["sequences"], s["round"]), []).append(s["tokens_per_s"])
    rounds = sorted({s["round"] for s in samples})
    ways = list(dict.fromkeys(way for way, _, _ in found))
    counts = {way: sorted({count for name, count, _ in found if name == way}) for way in ways}

    def median(way: str, count: int) -> float:
        return statistics.median(rate for turn in rounds for rate in found[way, count, turn])

    def pairs(one: str, other: str) -> dict[str, list[float]]:
        return {
            str(count): [
                ours / theirs
                for turn in rounds
                for ours, theirs in zip(found[one, count, turn], found[other, count, turn], strict=True)
            ]
            for count in counts[one]
            if count in counts[other]
        }

    compared = {key: pairs(*between) for key, between in RATIOS.items()}
    to_logits = [s for s in samples if s["what"] == "handoff_to_logits"]
    memory = max((s for s in samples if s["what"] == "memory"), key=lambda s: s["resident_bytes"])
    owed = memory["weights_bytes"] + memory["cells_bytes"]
    reads = {turn: s["read_gb_per_s"] for s in samples if s["what"] == "bandwidth" for turn in (s["round"],)}
    step_bytes = {
        n: memory["weights_bytes"] + n * memory["context_tokens"] * memory["cell_bytes"] for n in counts[OURS]
    }
    achieved = {
        str(n): statistics.median(
            statistics.median(found[OURS, n, turn]) / n * step_bytes[n] / 1e9 / reads[turn] for turn in rounds
        )
        for n in counts[OURS]
    }
    return {
        "tokens_per_s": {way: {str(n): median(way, n) for n in counts[way]} for way in ways},
        **{key: {n: statistics.median(each) for n, each in by_count.items()} for key, by_count in compared.items()},
        "quartiles": {key: {n: quartiles(each) for n, each in by_count.items()} for key, by_count in compared.items()},
        "tuned": next((tuned_shape(s) for s in samples if s["what"] == "tuned"), {}),
        **{f"itl_p99_{what}_ratio": p99_ratio(samples, what) for what in ("handoff", "prefill")},
        "itl_p99_ms": {
            f"{what}, {during}": p99([g for s in _gaps(samples, what, during) for g in s["gaps_ms"]])
            for what in ("handoff", "prefill")
            for during in ("quiet", "disturbed")
        },
        "speculation": decode_speculation.ratios(samples),
        "memory_bytes": {
            "weights": memory["weights_bytes"],
            "cells": memory["cells_bytes"],
            "the rest": memory["resident_bytes"] - owed,
        },
        "handoff_to_logits_ms": statistics.median(s["ms"] for s in to_logits),
        "handoff_sent_to_heard_ms": statistics.median(s["sent_to_heard_ms"] for s in to_logits),
        "memory_overhead_fraction": memory["resident_bytes"] / owed - 1,
        "stream_triad_gb_per_s": max(s["triad_gb_per_s"] for s in samples if s["what"] == "bandwidth"),
        "read_gb_per_s": max(reads.values()),
        "bandwidth_vs_stream": max(achieved.values()),
        "bandwidth_vs_stream_by_sequences": achieved,
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """Between which two numbers the middle half of at least two ``values`` lies."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def tuned_shape(sample: Sample) -> dict[str, Any]:
    """With what the tuned worker computed."""
    return {key: sample[key] for key in ("profile", "cell_layout", "flash_attention", "cell_type")}


def p99_ratio(samples: Sequence[Sample], what: str) -> float:
    """p99 of the gaps under disturbance over that of the quiet ones just before; median of all such pairs."""
    gaps = {
        (s["round"], s["repeat"], during): p99(s["gaps_ms"])
        for during in ("quiet", "disturbed")
        for s in _gaps(samples, what, during)
    }
    pairs = {(turn, repeat) for turn, repeat, _ in gaps}
    return statistics.median(gaps[(*pair, "disturbed")] / gaps[(*pair, "quiet")] for pair in pairs)


def p99(values: Sequence[float]) -> float:
    """The 99th percentile; of fewer than a hundred values nearly the largest."""
    return float(np.percentile(values, 99))


def _gaps(samples: Sequence[Sample], what: str, during: str) -> list[Sample]:
    return [s for s in samples if s["what"] == f"itl_{what}" and s["during"] == during]


def describe(sample: Sample) -> str:
    """One sample for a progress bar."""
    if sample["what"] == "speculation":
        return (
            f"{sample['weights']} weights, {sample['text']} text, guessing {sample['speculate']},"
            f" {sample['sequences']} sequences: {sample['tokens_per_s']:.0f} tokens/s"
        )
    if sample["what"] == "rate":
        return f"{sample['way']}, {sample['sequences']} sequences: {sample['tokens_per_s']:.0f} tokens/s"
    return str(sample["what"])


def table(summary: dict[str, Any]) -> Table:
    """The summary for a terminal."""
    shown = Table(title="tokens/s by sequences, medians", title_justify="left")
    counts = list(summary["tokens_per_s"][OURS])
    for column in ("way", *counts):
        shown.add_column(column, justify="left" if column == "way" else "right", no_wrap=column != "way")
    for way, rates in summary["tokens_per_s"].items():
        shown.add_row(way, *(f"{rates[n]:.1f}" if n in rates else "" for n in counts))
    shown.add_section()
    for key in RATIOS:
        shown.add_row(key, *(f"{summary[key][n]:.3f}" if n in summary[key] else "" for n in counts))
    shown.add_row("bandwidth_vs_stream", *(f"{summary['bandwidth_vs_stream_by_sequences'][n]:.3f}" for n in counts))
    shape = summary["tuned"]
    without = "" if shape.get("flash_attention", True) else ", no flash attention"
    shown.caption = (
        f"tuned: {shape.get('cell_type', 'f16')} cells, {shape.get('cell_layout', 'unified')}{without};"
        f" p99 of gaps at {LOAD.sequences} sequences: x{summary['itl_p99_handoff_ratio']:.2f} while"
        f" {LOAD.handoff_tokens} tokens land, x{summary['itl_p99_prefill_ratio']:.2f} while they prefill here;"
        f" {summary['handoff_to_logits_ms']:.1f} ms from the last frame of {LOAD.short_tokens} tokens to logits"
        f" beyond a step; memory {summary['memory_overhead_fraction']:+.1%} of weights and cells"
    )
    return shown
