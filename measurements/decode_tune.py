"""``isthmus measure decode --tune``: which settings decode fastest on this host, one after the other."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rich.console import Console
from rich.table import Table

from cpu_decode import profile
from cpu_decode.geometry import read_geometry
from cpu_decode.profile import Profile, Tuned
from measurements import result
from measurements.decode_ways import Rate, Setting, bench_rate, ours, warm_worker, worker_rate
from measurements.llama_tools import Tools, tools

T = TypeVar("T")
# A setting must be this much better than the one before it.
WORTHWHILE = 1.02
# Many sequences, some, one, and a prompt count alike.
COUNTS = (1, 8, 16)
SHAPE_ROUNDS = 3
PREFILL = "prefill"
Changes = dict[str, Any]
# By what was measured: over the first candidate in the same round.
Ratios = dict[str, float]
# How cells can be laid out, what then computes attention, and in which type: vLLM's own KV is bf16. llama.cpp's flash
# attention is slower over bf16 than over f16.
SHAPES: dict[str, Changes] = {
    "unified": {"cell_layout": "unified", "flash_attention": True, "cell_type": "f16"},
    "streams": {"cell_layout": "streams", "flash_attention": True, "cell_type": "f16"},
    "streams, no flash attention": {"cell_layout": "streams", "flash_attention": False, "cell_type": "f16"},
    "streams, no flash attention, bf16": {"cell_layout": "streams", "flash_attention": False, "cell_type": "bf16"},
}
# What our worker cannot do, or costs quality: looked at, not chosen.
VARIANTS = {
    "as the worker": (),
    "no flash attention": ("-fa", "off"),
    "q8_0 cells": ("-ctk", "q8_0", "-ctv", "q8_0"),
}


def run(setting: Setting, path: Path, rounds: int) -> None:
    """Find the settings, print them, and write the profile to ``path``.

    Raises :class:`ConfigError` if it cannot be written, or without a compiler for llama.cpp's programs.
    """
    # Fail before building llama.cpp's programs, which takes minutes.
    cells = shapes(setting.gguf)
    console = Console(stderr=True)
    programs = tools(console)
    host = result.environment()
    tuned = Tuned(threads=setting.threads, batch_threads=setting.threads, spin_count=1000, huge_pages=True, mmap=False)
    seen: dict[str, float] = {}
    for axis in [cells, *axes(setting.threads, len(os.sched_getaffinity(0)))]:
        candidates = [msgspec.structs.replace(tuned, **changes) for changes in axis.values()]
        # A shape for each load is thought of, so that they are looked at one by one.
        counts = setting.sequences if axis is cells else [n for n in COUNTS if n <= setting.sequences[-1]]
        ratios = compare(setting, candidates, counts, rounds, console)
        scores = [statistics.geometric_mean(each.values()) for each in ratios]
        seen |= dict(zip(axis, scores, strict=True))
        tuned = pick(candidates, scores)
        if axis is cells:
            seen |= gain_of_switching(ratios, candidates.index(tuned))
    batches = row_ns(setting, tuned)
    seen |= {f"{rows} rows over one": ns / batches[1] for rows, ns in batches.items()}
    seen |= look(setting, programs, console)
    profile.write(path, Profile(decode=tuned, row_ns=batches, gguf=str(setting.gguf), host=host, seen=seen))
    Console().print(table(tuned, seen))


def shapes(gguf: Path) -> dict[str, Changes]:
    """Those of ``SHAPES`` that the model can be served in."""
    windows = read_geometry(gguf).sliding_window
    return {name: changes for name, changes in SHAPES.items() if name == "unified" or not windows}


def axes(cores: int, processors: int) -> list[dict[str, Changes]]:
    """What is tried, in this order; the first value of each is the one that holds until then."""
    threads = tuple(dict.fromkeys((cores, processors, max(1, cores // 2))))
    values: dict[str, tuple[Any, ...]] = {
        "spin_count": (1000, 0, 10_000, 100_000),
        "huge_pages": (True, False),
        "mmap": (False, True),
        "threads": threads,
        "batch_threads": threads,
    }
    return [{f"{key} {value}": {key: value} for value in tried} for key, tried in values.items()]


def fastest_shape(setting: Setting) -> Changes:
    """The shape that decodes fastest at the setting's numbers of sequences.

    Unified cells, which do more, stay unless another is clearly better.
    """
    found = list(shapes(setting.gguf).values())
    with ExitStack() as up:
        decodes = [msgspec.structs.replace(setting.decode, **changes) for changes in found]
        rates = [up.enter_context(worker_rate(setting, decode)) for decode in decodes]
        ratios = in_turns(rates, setting.sequences, SHAPE_ROUNDS)
    return pick(found, [statistics.geometric_mean(each.values()) for each in ratios])


def compare(
    setting: Setting, candidates: Sequence[Tuned], counts: Sequence[int], rounds: int, console: Console
) -> list[Ratios]:
    """How fast each is over the first, in prefill and by number of sequences."""
    with ExitStack() as up:
        decodes = [msgspec.structs.replace(setting.decode, **msgspec.structs.asdict(each)) for each in candidates]
        workers = [up.enter_context(warm_worker(setting, decode)) for decode in decodes]
        prefill = [worker.status().prefill_tokens_per_s for worker in workers]
        ratios = in_turns([partial(ours, worker, setting=setting) for worker in workers], counts, rounds)
    for candidate, each, tokens_per_s in zip(candidates, ratios, prefill, strict=True):
        each[PREFILL] = tokens_per_s / prefill[0]
        console.print(f"{candidate}: {statistics.geometric_mean(each.values()):.3f}", highlight=False)
    return ratios


def in_turns(rates: Sequence[Rate], counts: Sequence[int], rounds: int) -> list[Ratios]:
    """Of each, over the first one, by number of sequences: medians of neighbours in time.

    All are up and take turns: between one start and the next a host may have changed its pace.
    """
    ratios: list[Ratios] = [{} for _ in rates]
    for count in counts:
        taken = [[rate(count) for rate in rates] for _ in range(rounds)]
        for index, each in enumerate(ratios):
            each[f"{count} sequences"] = statistics.median(turn[index] / turn[0] for turn in taken)
    return ratios


def gain_of_switching(ratios: Sequence[Ratios], chosen: int) -> dict[str, float]:
    """How much faster the best shape for a number of sequences is there than the chosen one, which is for all.

    Near 1 everywhere: a worker that changed its shape with its load would gain nothing.
    """
    return {
        f"best cells for {what} over the chosen": max(each[what] for each in ratios) / chosen_ratio
        for what, chosen_ratio in ratios[chosen].items()
        if what != PREFILL
    }


def pick(candidates: Sequence[T], scores: Sequence[float]) -> T:
    """The best, or the first one if the best is hardly better."""
    best = max(range(len(scores)), key=scores.__getitem__)
    return candidates[best if scores[best] >= WORTHWHILE * scores[0] else 0]


def row_ns(setting: Setting, tuned: Tuned) -> dict[int, float]:
    """How long a batch takes with ``tuned``, in ns by its number of rows: what guessing tokens costs."""
    # Read when llama.cpp is loaded.
    os.environ["GOMP_SPINCOUNT"] = str(tuned.spin_count)
    from cpu_decode.calibration import measure
    from cpu_decode.llama import Batch, Model
    from cpu_decode.speculate import TIMED_ROWS
    from cpu_decode.streams import open_context

    model = Model(setting.gguf, mapped=tuned.mmap)
    decode = setting.room_for(msgspec.structs.replace(setting.decode, **msgspec.structs.asdict(tuned)))
    context = open_context(model, decode, setting.ubatch_tokens, tuned.threads, tuned.batch_threads)
    try:
        return measure(context, Batch(setting.ubatch_tokens), TIMED_ROWS).row_ns
    finally:
        context.close()
        model.close()


def look(setting: Setting, programs: Tools, console: Console) -> dict[str, float]:
    """Tokens/s of llama-batched-bench under settings that no profile chooses, at the fewest and most sequences."""
    setting = setting._replace(sequences=tuple(dict.fromkeys((setting.sequences[0], setting.sequences[-1]))))
    seen: dict[str, float] = {}
    for name, flags in VARIANTS.items():
        with bench_rate(setting, programs, setting.sequences, flags) as rate:
            seen |= {f"{name}, {count} sequences, tokens/s": rate(count) for count in setting.sequences}
        console.print(f"looked at: {name}", highlight=False)
    return seen


def table(tuned: Tuned, seen: dict[str, float]) -> Table:
    """What was found, for a terminal."""
    shown = Table(title="settings: speed over the setting before; llama.cpp: tokens/s", title_justify="left")
    shown.add_column("what")
    shown.add_column("speed", justify="right")
    for name, value in seen.items():
        shown.add_row(name, f"{value:.3f}")
    shown.caption = f"chosen: {tuned}"
    return shown
