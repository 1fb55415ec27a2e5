"""What guessing from the text so far is worth: a worker with ``speculate = "auto"`` over one with ``"off"``.

On text that repeats itself and on text that does not; with the weights of the file, and with the same weights in bf16,
where a row more costs less of a step, for reading the weights takes more of it.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from measurements.decode_ways import Setting, steady_rate
from measurements.decode_worker import LiveWorker, live_worker
from measurements.requantize import FileType, requantized

Sample = dict[str, Any]
Text = Literal["copied", "new"]

# Prompts are prefilled one after the other, and all must be there before the first answer ends.
BLOCK_TOKENS, BLOCKS = 48, 4
NEW_TOKENS = 240
COUNTS = (1, 4)
STARTS, TURNS_A_START = 4, 2
MODES = ("off", "auto")
TEXTS: tuple[Text, ...] = ("copied", "new")


def measure(setting: Setting, turn: int) -> Iterator[Sample]:
    """Tokens/s by weights, kind of text, number of sequences and ``speculate``.

    Both workers are up, and take turns: between one start and the next a host may have changed its pace. Both are
    started several times: where a process's memory comes to lie is worth some percent for as long as it lives.
    """
    with bf16_weights(setting.gguf) as bf16:
        for (weights, gguf), start in itertools.product((("file", setting.gguf), ("bf16", bf16)), range(STARTS)):
            with ExitStack() as exits:
                workers = {
                    mode: exits.enter_context(
                        live_worker(gguf, msgspec.structs.replace(setting.decode, speculate=mode))
                    )
                    for mode in MODES
                }
                repeats = range(start * TURNS_A_START, (start + 1) * TURNS_A_START)
                for repeat, text, count in itertools.product(repeats, TEXTS, COUNTS):
                    for mode in MODES if (turn + repeat) % 2 == 0 else reversed(MODES):
                        yield {
                            "what": "speculation",
                            "round": turn,
                            "repeat": repeat,
                            "weights": weights,
                            "text": text,
                            "speculate": mode,
                            "sequences": count,
                            **_decode(workers[mode], text, count, repeat * count),
                        }


def _decode(worker: LiveWorker, text: Text, count: int, seed: int) -> Sample:
    """Tokens/s of ``count`` sequences, and how much was guessed and came true."""
    before = worker.status()
    tokens_per_s = _rate(worker, text, count, seed)
    after = worker.status()
    return {
        "tokens_per_s": tokens_per_s,
        "drafted_tokens": after.drafted_tokens - before.drafted_tokens,
        "accepted_tokens": after.accepted_tokens - before.accepted_tokens,
    }


def _rate(worker: LiveWorker, text: Text, count: int, seed: int) -> float:
    streams = [worker.reserve_prompt(prompt(text, seed + k), NEW_TOKENS) for k in range(count)]
    for stream in streams:
        worker.start(stream)
    worker.take_until(streams)
    worker.idle()
    return steady_rate([list(zip(s.times_ns, s.counts, strict=True)) for s in streams])


def prompt(text: Text, seed: int) -> list[int]:
    """A block of random tokens four times over, which models go on repeating, or as many that do not repeat."""
    draw = np.random.default_rng(seed)
    blocks, times = (1, BLOCKS) if text == "copied" else (BLOCKS, 1)
    tokens: list[int] = draw.integers(1000, 9000, blocks * BLOCK_TOKENS).tolist()
    return tokens * times


@contextmanager
def bf16_weights(gguf: Path) -> Iterator[Path]:
    """A file of the same model with its matrices in bf16, for the body. Raises :class:`EngineError` if it fails."""
    with tempfile.TemporaryDirectory(prefix="isthmus-bf16-") as folder:
        yield requantized(gguf, Path(folder) / f"{gguf.stem}-bf16.gguf", FileType.BF16)


def ratios(samples: list[Sample]) -> dict[str, float]:
    """Tokens/s of ``auto`` over ``off`` just before or after, medians, by what was decoded."""
    found: dict[str, dict[tuple[int, int], dict[str, float]]] = {}
    for s in samples:
        if s["what"] == "speculation":
            name = f"{s['weights']} weights, {s['text']} text, {s['sequences']} sequences"
            found.setdefault(name, {}).setdefault((s["round"], s["repeat"]), {})[s["speculate"]] = s["tokens_per_s"]
    return {
        name: statistics.median(pair["auto"] / pair["off"] for pair in pairs.values()) for name, pairs in found.items()
    }
