"""What a step costs beside computing, on models of several sizes: speed against llama.cpp's own programs, and memory.

Weights are random (``synthetic_gguf.py``): no model need be at hand.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from measurements import decode, result, targets
from measurements.decode import OURS, RATIOS, SMALL_PAGES, alike, rates
from measurements.decode_targets import LEAST_RATES, MOST_MEMORY
from measurements.decode_ways import Rate, Setting, ours, warm_worker
from measurements.llama_tools import Tools, tools
from measurements.synthetic_gguf import shape_of, synthetic_gguf
from measurements.targets import Verdict

Sample = dict[str, Any]

# For want of time: each turn of llama-batched-bench begins with a prefill, of 8b for a minute a sequence on two cores.
SEQUENCES = {"360m": "1,2,4,8,16", "1b": "1,2,4", "8b": ""}
# Ratios of our worker as it comes, and of the one in small pages.
COMPARED = {key: f"small_pages_{key}" for key in LEAST_RATES}


def run(json: Path | None, plot: Path | None, shapes: str, sequences: str | None, context: int, tokens: int) -> None:
    """Measure; print a table, write ``json`` and draw ``plot`` if given. ``shapes`` and ``sequences`` are lists.

    Raises :class:`ConfigError` for a list that makes no sense, without a compiler for llama.cpp's programs, and for
    files that cannot be written.
    """
    names = tuple(dict.fromkeys(shapes.split(",")))
    for name in names:
        shape_of(name)
    if sequences is not None:
        decode.sequence_counts(sequences)
    if plot is not None:
        # Fail before measuring, not after.
        import matplotlib as _  # noqa: F401
    console = Console(stderr=True)
    programs = tools(console)
    environment = result.environment()
    samples = []
    with Progress(console=console) as progress:
        task = progress.add_task("sizes", total=None)
        for name in names:
            progress.update(task, description=f"writing a model of shape {name}")
            with synthetic_gguf(name) as gguf:
                counts = sequences or SEQUENCES[name]
                setting = decode.setting(gguf, counts or "1", context, tokens)
                for sample in measure(setting, programs) if counts else [memory_alone(setting)]:
                    samples.append(sample | {"shape": name})
                    progress.update(task, advance=1, description=f"{name}: {decode.describe(sample)}")
    summary = summarize(samples)
    if json is not None:
        result.write(json, "decode-sizes", environment, samples, summary)
    if plot is not None:
        draw(summary, plot)
    Console().print(table(summary))
    Console().print(targets.table(verdicts(summary)))


def memory_alone(setting: Setting) -> Sample:
    """The memory of a worker as it is shipped that has decoded a sequence."""
    with warm_worker(setting, setting.decode) as worker:
        return decode.memory(worker, setting)


def measure(setting: Setting, programs: Tools) -> Iterator[Sample]:
    """Throughput by each way in turns, then the most memory that a worker of ours has come to meanwhile."""
    resident: list[Sample] = []

    @contextmanager
    def rate_of_ours() -> Iterator[Rate]:
        with warm_worker(setting, setting.decode) as worker:
            yield partial(ours, worker, setting=setting)
            resident.append(decode.memory(worker, setting))

    yield from rates(setting, alike(setting, programs) | {OURS: rate_of_ours})
    yield max(resident, key=lambda sample: sample["resident_bytes"])


def summarize(samples: list[Sample]) -> dict[str, Any]:
    """By shape: ratios of neighbours in time and what a step of ours takes longer, medians; memory."""
    memory = {s["shape"]: s for s in samples if s["what"] == "memory"}
    found: dict[str, dict[str, dict[int, list[float]]]] = {shape: {} for shape in memory}
    for s in samples:
        if s["what"] == "rate":
            found[s["shape"]].setdefault(s["way"], {}).setdefault(s["sequences"], []).append(s["tokens_per_s"])

    def pairs(shape: str, one: str, other: str) -> dict[str, list[float]]:
        return {
            str(count): [ours_ / theirs for ours_, theirs in zip(rates, found[shape][other][count], strict=True)]
            for count, rates in found[shape].get(one, {}).items()
        }

    def figures(shape: str) -> Sample:
        compared = {key: pairs(shape, *RATIOS[key]) for key in (*COMPARED, *COMPARED.values())}
        step_ms, small_pages_ms = (
            {str(n): 1e3 * n / statistics.median(rates) for n, rates in found[shape].get(way, {}).items()}
            for way in (OURS, SMALL_PAGES)
        )
        return {
            "step_ms": step_ms,
            **{key: {n: statistics.median(each) for n, each in by_count.items()} for key, by_count in compared.items()},
            "quartiles": {
                key: {n: decode.quartiles(each) for n, each in by_count.items()} for key, by_count in compared.items()
            },
            "beyond_batched_bench_ms": {
                n: small_pages_ms[n] * (1 - statistics.median(each))
                for n, each in compared["small_pages_vs_batched_bench"].items()
            },
            **{key: memory[shape][key] for key in ("weights_bytes", "cells_bytes", "resident_bytes")},
            "memory_overhead_fraction": memory[shape]["resident_bytes"]
            / (memory[shape]["weights_bytes"] + memory[shape]["cells_bytes"])
            - 1,
        }

    return {"shapes": {shape: figures(shape) for shape in found}}


def verdicts(summary: dict[str, Any]) -> Iterator[Verdict]:
    """What ``measure decode`` must reach, at each size."""
    for shape, figures in summary["shapes"].items():
        for key, least in LEAST_RATES.items():
            for count, value in figures[key].items():
                yield Verdict(f"{shape}: {key}, {count} sequences", value, "at least", least)
        yield Verdict(f"{shape}: memory_overhead_fraction", figures["memory_overhead_fraction"], "at most", MOST_MEMORY)


def table(summary: dict[str, Any]) -> Table:
    """The summary for a terminal."""
    shown = Table(title="ours over llama.cpp's programs (in small pages), medians", title_justify="left")
    for column in ("shape", "sequences", "ms a step", "over bench", "over server", "beyond bench"):
        shown.add_column(column, justify="left" if column == "shape" else "right")
    for shape, figures in summary["shapes"].items():
        for count, ms in figures["step_ms"].items():
            ratios = (f"{figures[key][count]:.3f} ({figures[small][count]:.3f})" for key, small in COMPARED.items())
            shown.add_row(shape, count, f"{ms:.1f}", *ratios, f"{figures['beyond_batched_bench_ms'][count]:.2f} ms")
        shown.add_section()
    shown.caption = "beyond weights and cells: " + "; ".join(
        f"{shape} {_rest_bytes(figures) >> 20} MiB, {figures['memory_overhead_fraction']:+.1%}"
        for shape, figures in summary["shapes"].items()
    )
    return shown


def _rest_bytes(figures: dict[str, Any]) -> int:
    return int(figures["resident_bytes"] - figures["weights_bytes"] - figures["cells_bytes"])


def draw(summary: dict[str, Any], path: Path) -> None:
    """Ratios by number of sequences, and memory, in the format of ``path``'s name."""
    from matplotlib.figure import Figure

    from measurements import picture

    figure = Figure(figsize=(13, 4), layout="constrained")
    bench, server, memory = figure.subplots(1, 3)
    shapes = summary["shapes"]
    for axes, (key, least) in zip((bench, server), LEAST_RATES.items(), strict=True):
        for shape, figures in shapes.items():
            if ratios := figures[key]:
                at, bounds = [int(n) for n in ratios], zip(*figures["quartiles"][key].values(), strict=True)
                axes.plot(at, list(ratios.values()), marker="o", label=shape)
                axes.fill_between(at, *bounds, alpha=0.2)
        counts = max((figures[key] for figures in shapes.values()), key=len)
        axes.axhline(least, color="grey", linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks([int(n) for n in counts], list(counts))
        axes.set(xlabel="sequences", title=f"tokens/s: {key}, middle half shaded")
        axes.legend()
    overhead = [100 * figures["memory_overhead_fraction"] for figures in shapes.values()]
    memory.bar(list(shapes), overhead)
    memory.axhline(100 * MOST_MEMORY, color="grey", linestyle="--")
    memory.set(ylabel="% beyond weights and cells", title="resident memory of the worker")
    picture.save(figure, path)
