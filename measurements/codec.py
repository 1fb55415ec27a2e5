"""How small, how fast and how faithful each codec is, on real KV."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from measurements import picture, result
from transfer.codecs import CELL_ELEMENT, CODECS, Codec
from transfer.config import Link
from transfer.frames import Element
from transfer.geometry import KVGeometry
from transfer.layout import CellType, Payload

if TYPE_CHECKING:
    from cpu_decode.llama import Model
    from measurements.kv import Frame, PromptKV

Sample = dict[str, Any]

ROUNDING = "bf16 rounding"
WEIGHTS = "weights at q8_0"


def run(json: Path | None, plot: Path | None, rounds: int) -> None:
    """Measure every codec with the default model; print a table, write ``json`` and draw ``plot`` if given.

    Raises :class:`ConfigError` for files that cannot be written and when the default model is not installed.
    """
    if plot is not None:
        # Fail before measuring, not after.
        import matplotlib as _  # noqa: F401
    environment = result.environment()
    samples = measure(rounds, Console(stderr=True))
    summary = summarize(samples)
    if json is not None:
        result.write(json, "codec", environment, samples, summary)
    if plot is not None:
        draw(summary, plot)
    Console().print(table(summary))


def measure(rounds: int, console: Console) -> list[Sample]:
    """Samples of both kinds: fidelity by prompt and codec, speed by round and codec."""
    from cpu_decode.geometry import read_geometry
    from cpu_decode.llama import Model
    from cpu_decode.service import usable_cores
    from isthmus.pair import default_gguf
    from measurements import kv, prompts

    gguf = default_gguf()
    geometry, model, link = read_geometry(gguf), Model(gguf), Link()
    threads, texts = usable_cores(), prompts.texts()
    samples: list[Sample] = []
    with Progress(console=console) as progress:
        prefilling = progress.add_task("prefill", total=2 * len(texts))
        held: dict[CellType, list[kv.PromptKV]] = {"bf16": [], "f16": []}
        for cell_type, known in held.items():
            for prompt in kv.prefill(model, geometry, texts, cell_type, threads):
                known.append(prompt)
                progress.advance(prefilling)
        comparing = progress.add_task("fidelity", total=len(texts) * (len(CODECS) + 2))
        for sample in (
            *fidelities(model, geometry, held["bf16"], held["f16"], link, threads),
            *weight_fidelities(gguf, held["bf16"], threads),
        ):
            samples.append(sample)
            progress.advance(comparing)
        model.close()
        # The longest prompt has a whole chunk.
        longest = max(held["bf16"], key=lambda prompt: len(prompt.prompt))
        whole = [
            frame for frame in kv.frames_of(longest, geometry, link) if len(frame.slab.tokens) == link.chunk_tokens
        ]
        timing = progress.add_task("speed", total=rounds * (len(CODECS) + 1))
        for sample in speeds(whole, rounds):
            samples.append(sample)
            progress.advance(timing)
    return samples


def fidelities(
    model: Model,
    geometry: KVGeometry,
    prompts: Sequence[PromptKV],
    unrounded: Sequence[PromptKV],
    link: Link,
    threads: int,
) -> Iterator[Sample]:
    """Divergence of what each codec lands, from uncompressed KV in f16 cells.

    Codecs land in f16 cells, ``rows_*`` in cells of their own type, whose effect on attention is then part of theirs.
    ``prompts`` hold bf16 KV. ``unrounded`` hold f16 KV of the same prompts, for the yardstick ``bf16 rounding``:
    how far predictions move when that KV is rounded to bf16, which is less than any lossy codec does to it.
    """
    from cpu_decode.llama import Context
    from measurements import kv

    contexts = {
        cell_type: Context(
            model, num_cells=kv.MAX_TOKENS, max_sequences=1, batch_tokens=256, threads=threads, cell_type=cell_type
        )
        for cell_type in _cell_types()
    }
    context = contexts["f16"]
    for prompt, exact in zip(prompts, unrounded, strict=True):
        about = {"kind": "fidelity", "prompt": prompt.name, "prompt_tokens": len(prompt.prompt)}
        frames = list(kv.frames_of(prompt, geometry, link))
        num_elements = sum(frame.elements.size for frame in frames)
        plain, _ = kv.through(CODECS["raw"], frames)
        expected = kv.predictions(context, prompt, plain)
        for codec in CODECS.values():
            chunks, wire_bytes = kv.through(codec, frames)
            got = kv.predictions(contexts[codec.lands_in[0]], prompt, chunks)
            kl, top1 = kv.divergence(expected, got)
            bits = 8 * wire_bytes / num_elements
            yield about | {"codec": codec.name, "bits_per_element": bits, "kl": kl, "top1": top1}
        plain, _ = kv.through(CODECS["raw"], list(kv.frames_of(exact, geometry, link)), Element.F16)
        expected = kv.predictions(context, exact, plain)
        plain, _ = kv.through(CODECS["raw"], list(kv.frames_of(kv.rounded_to_bf16(exact), geometry, link)))
        kl, top1 = kv.divergence(expected, kv.predictions(context, exact, plain))
        yield about | {"codec": ROUNDING, "kl": kl, "top1": top1}
    for context in contexts.values():
        context.close()


def weight_fidelities(gguf: Path, prompts: Sequence[PromptKV], threads: int) -> Iterator[Sample]:
    """The yardstick ``weights at q8_0``: divergence of the model with its weights at q8_0 from the same at fp32."""
    from measurements import weights

    divergences = weights.q8_0_divergences(gguf, prompts, threads)
    for prompt, (kl, top1) in zip(prompts, divergences, strict=True):
        about = {"kind": "fidelity", "prompt": prompt.name, "prompt_tokens": len(prompt.prompt)}
        yield about | {"codec": WEIGHTS, "kl": kl, "top1": top1}


def _cell_types() -> list[CellType]:
    """The types of cells that codecs are measured in."""
    return list(dict.fromkeys(codec.lands_in[0] for codec in CODECS.values()))


def speeds(frames: Sequence[Frame], rounds: int) -> Iterator[Sample]:
    """Encode and decode ``frames`` with each codec in turn, and copy them, ``rounds`` times on one core.

    GB/s of 16-bit elements. The order shifts by one each round; one round more, the first, is not counted.
    """
    from measurements import kv

    places = {cell_type: kv.chunks_for(frames, cell_type) for cell_type in _cell_types()}
    copies = [np.empty_like(frame.elements) for frame in frames]
    payloads: dict[str, list[Payload]] = {}
    num_bytes = sum(frame.elements.nbytes for frame in frames)

    def encode(codec: Codec) -> None:
        payloads[codec.name] = [codec.encode(f.elements, Element.BF16, f.slab) for f in frames]

    def decode(codec: Codec) -> None:
        cell_type = codec.lands_in[0]
        for frame, payload in zip(frames, payloads[codec.name], strict=True):
            tokens = frame.slab.tokens
            outs = places[cell_type][tokens.start].planes(frame.first_layer, frame.slab.num_layers)
            codec.decode(payload, Element.BF16, CELL_ELEMENT[cell_type], outs, tokens)

    def copy() -> None:
        for frame, target in zip(frames, copies, strict=True):
            np.copyto(target, frame.elements)

    names = ["memcpy", *CODECS]
    with _one_core():
        for turn in range(rounds + 1):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                if name == "memcpy":
                    sample = {"kind": "speed", "codec": name, "round": turn, "copy_gb_per_s": _rate(num_bytes, copy)}
                else:
                    codec = CODECS[name]
                    sample = {
                        "kind": "speed",
                        "codec": name,
                        "round": turn,
                        "encode_gb_per_s": _rate(num_bytes, partial(encode, codec)),
                        "decode_gb_per_s": _rate(num_bytes, partial(decode, codec)),
                    }
                if turn:
                    yield sample


def _rate(num_bytes: int, work: Callable[[], None]) -> float:
    began = time.monotonic_ns()
    work()
    return num_bytes / (time.monotonic_ns() - began)


@contextmanager
def _one_core() -> Iterator[None]:
    """Keep this thread on one core, and give it back its cores afterwards."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """Plain numbers by codec. Speeds against memcpy are medians of ratios taken within a round."""
    speed = {(s["codec"], s["round"]): s for s in samples if s["kind"] == "speed"}
    copies = {turn: s["copy_gb_per_s"] for (codec, turn), s in speed.items() if codec == "memcpy"}
    summary: dict[str, Any] = {"memcpy_gb_per_s": _spread(list(copies.values()))}
    for key, yardstick in (("bf16_rounding", ROUNDING), ("weights_q8_0", WEIGHTS)):
        moved = [s for s in samples if s["codec"] == yardstick]
        summary[key] = {
            "kl_mean": statistics.fmean(s["kl"] for s in moved),
            "top1": statistics.fmean(s["top1"] for s in moved),
        }
    for name in CODECS:
        fidelity = [s for s in samples if s["kind"] == "fidelity" and s["codec"] == name]
        encodes = {turn: s["encode_gb_per_s"] for (codec, turn), s in speed.items() if codec == name}
        decodes = {turn: s["decode_gb_per_s"] for (codec, turn), s in speed.items() if codec == name}
        tokens = [s["prompt_tokens"] for s in fidelity]
        summary[name] = {
            # Every prompt counts by its tokens: all have the same elements a token.
            "bits_per_element": float(np.average([s["bits_per_element"] for s in fidelity], weights=tokens)),
            "kl_mean": statistics.fmean(s["kl"] for s in fidelity),
            "kl_max": max(s["kl"] for s in fidelity),
            "top1": statistics.fmean(s["top1"] for s in fidelity),
            "encode_gb_per_s": _spread(list(encodes.values())),
            "decode_gb_per_s": _spread(list(decodes.values())),
            "encode_vs_memcpy": statistics.median(rate / copies[turn] for turn, rate in encodes.items()),
            "decode_vs_memcpy": statistics.median(rate / copies[turn] for turn, rate in decodes.items()),
        }
    return summary


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = (float(value) for value in np.quantile(values, [0.25, 0.5, 0.75]))
    return {"median": median, "quartile_1": low, "quartile_3": high}


def table(summary: dict[str, Any]) -> Table:
    """The summary for a terminal."""
    copy = summary["memcpy_gb_per_s"]["median"]
    shown = Table(
        title=f"codecs: KL and top-1 to uncompressed KV; GB/s of 16-bit elements on one core, memcpy {copy:.1f}",
        title_justify="left",
    )
    for column in ("codec", "bits/element", "KL", "top-1", "encode", "decode", "of memcpy"):
        shown.add_column(column, justify="left" if column == "codec" else "right", no_wrap=column != "codec")
    for name in CODECS:
        row = summary[name]
        shown.add_row(
            name,
            f"{row['bits_per_element']:.2f}",
            f"{row['kl_mean']:.1e}",
            f"{row['top1']:.3f}",
            f"{row['encode_gb_per_s']['median']:.2f}" if name != "raw" else "a view",
            f"{row['decode_gb_per_s']['median']:.2f}",
            " / ".join(
                "-" if (name, side) == ("raw", "encode") else f"{row[f'{side}_vs_memcpy']:.2f}"
                for side in ("encode", "decode")
            ),
        )
    rounding, weights = summary["bf16_rounding"], summary["weights_q8_0"]
    shown.caption = (
        "rows_* in quantized cells, the others in f16 cells\n"
        f"yardstick, KV rounded to bf16: KL {rounding['kl_mean']:.1e}, top-1 {rounding['top1']:.3f}\n"
        f"yardstick, weights at q8_0: KL {weights['kl_mean']:.1e}, top-1 {weights['top1']:.3f}"
    )
    shown.caption_justify = "left"
    return shown


def draw(summary: dict[str, Any], path: Path) -> None:
    """Size against divergence, and speeds, as a picture in the format of ``path``'s name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    size, speed = figure.subplots(1, 2)
    for name in CODECS:
        row = summary[name]
        size.plot(row["bits_per_element"], row["kl_mean"], "o")
        # Rows lie close above a codec of the same size.
        beside = (6, 3) if name.startswith("rows_") or not row["kl_mean"] else (6, -9)
        place = (row["bits_per_element"], row["kl_mean"])
        size.annotate(name, place, xytext=beside, textcoords="offset points", fontsize=9)
    size.axhline(summary["bf16_rounding"]["kl_mean"], color="grey", linestyle="--", label="KV rounded to bf16")
    size.axhline(summary["weights_q8_0"]["kl_mean"], color="grey", linestyle=":", label=WEIGHTS)
    size.legend()
    size.set_yscale("symlog", linthresh=1e-3, linscale=0.5)
    size.set(xlabel="bits an element, all metadata", ylabel="mean KL to uncompressed KV, nats", title="size, fidelity")
    largest = max(summary[name]["kl_mean"] for name in CODECS)
    size.set_ylim(-2e-4, 3 * max(largest, 1e-5))
    size.set_xlim(2, 17.5)
    at = np.arange(len(CODECS))
    for shift, side in ((-0.2, "encode"), (0.2, "decode")):
        rates = [summary[name][f"{side}_gb_per_s"] for name in CODECS]
        middle = np.array([rate["median"] for rate in rates])
        spread = [middle - [r["quartile_1"] for r in rates], [r["quartile_3"] for r in rates] - middle]
        speed.bar(at + shift, middle, 0.4, yerr=spread, capsize=2, label=side)
    speed.axhline(summary["memcpy_gb_per_s"]["median"], color="grey", linestyle="--", label="memcpy")
    speed.set_xticks(at, list(CODECS), rotation=35, ha="right")
    speed.set(yscale="log", ylabel="GB/s of 16-bit elements, one core", title="speed: medians and quartiles")
    # raw only hands a view on: its bar would dwarf the others.
    speed.set_ylim(0.1, 4 * summary["memcpy_gb_per_s"]["median"])
    speed.legend()
    picture.save(figure, path)
