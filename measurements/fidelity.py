"""How well decoding goes on from another engine's KV, against the model's own prefill and the fp32 reference."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from measurements import picture, result
from transfer.codecs import CODECS, Codec
from transfer.config import Link, Pair
from transfer.errors import ConfigError

if TYPE_CHECKING:
    from cpu_decode.llama import Context, Model
    from measurements.kv import Logits, PromptKV
    from transfer.layout import CellType

Sample = dict[str, Any]

NATIVE = "native prefill"
# A text file is cut into windows of so many tokens, evenly spread over it.
WINDOW_TOKENS = 512
MAX_WINDOWS = 16


def run(pair: Pair, names: Sequence[str], text: Path | None, json: Path | None, plot: Path | None) -> dict[str, Any]:
    """Measure ``pair`` with the codecs of these names on our prompts, or on windows of the file ``text``.

    Prints a table, writes ``json`` and draws ``plot`` if given; returns the summary. Raises :class:`ConfigError` for
    files that cannot be read or written, texts that are too short, and pairs that do not fit or whose model has sliding
    windows.
    """
    if plot is not None:
        # Fail before measuring, not after.
        import matplotlib as _  # noqa: F401
    environment = result.environment()
    samples = measure(pair, [CODECS[name] for name in names], text, Console(stderr=True))
    summary = summarize(samples)
    if json is not None:
        result.write(json, "fidelity", environment, samples, summary)
    if plot is not None:
        draw(summary, plot)
    Console().print(table(summary, pair.name))
    return summary


def too_far(summary: dict[str, Any], max_kl: float) -> list[str]:
    """A line for each codec whose mean KL to the fp32 model is over ``max_kl`` nats, or no number."""
    found = {name: summary[name]["kl_split"] for name in _codecs(summary)}
    return [
        f"{name}: {kl:.2e} nats from fp32, more than {max_kl:g}; native prefill: {summary['kl_native']:.2e}"
        for name, kl in found.items()
        if not kl <= max_kl
    ]


def measure(pair: Pair, codecs: Sequence[Codec], text: Path | None, console: Console) -> list[Sample]:
    """A sample for each prompt and way to its KV: native prefill, and the other engine's through each codec."""
    from cpu_decode.geometry import read_geometry
    from cpu_decode.llama import Context, Model
    from cpu_decode.service import usable_cores
    from gpu_prefill.geometry import read_geometry as read_hf_geometry
    from gpu_prefill.geometry import read_rope_order
    from measurements import kv
    from measurements.reference import Reference
    from transfer.geometry import require_same

    gguf, hf_dir = Path(pair.gguf), Path(pair.hf_dir)
    geometry = read_geometry(gguf)
    require_same(geometry, read_hf_geometry(hf_dir))
    model = Model(gguf)
    chosen = prompts(model, text)
    cell_types: list[CellType] = list(dict.fromkeys(("f16", *(codec.lands_in[0] for codec in codecs))))
    samples: list[Sample] = []
    with Progress(console=console) as progress:
        transplanting = progress.add_task("KV in bf16", total=len(chosen))
        half = Reference(hf_dir, "bfloat16")
        orders = read_rope_order(hf_dir), model.rope_order
        held = []
        for name, (prompt, continuation) in chosen.items():
            held.append(kv.PromptKV(name, prompt, continuation, half.planes(prompt, geometry, *orders)))
            progress.advance(transplanting)
        # Only one copy of the weights at a time.
        del half
        reference = Reference(hf_dir, "float32")
        comparing = progress.add_task("fidelity", total=len(held) * (len(codecs) + 2))
        contexts = {
            cell_type: Context(
                model,
                num_cells=kv.MAX_TOKENS,
                max_sequences=1,
                batch_tokens=kv.MAX_TOKENS,
                threads=usable_cores(),
                cell_type=cell_type,
            )
            for cell_type in cell_types
        }
        for prompt_kv in held:
            expected = reference.predictions(prompt_kv.prompt, prompt_kv.continuation, model.vocab_size)
            greedy = reference.greedy(prompt_kv.prompt, kv.CONTINUATION_TOKENS, model.vocab_size)
            progress.advance(comparing)
            for sample in compare(contexts, prompt_kv, expected, greedy, codecs, geometry):
                samples.append(sample)
                progress.advance(comparing)
        for context in contexts.values():
            context.close()
    model.close()
    return samples


def prompts(model: Model, text: Path | None) -> dict[str, tuple[list[int], list[int]]]:
    """Prompt and continuation by name: ours, or windows of a file, each behind the model's begin-of-text."""
    from measurements import kv
    from measurements.prompts import texts

    if text is None:
        tokens = {name: kv.tokenize(model, each)[: kv.MAX_TOKENS] for name, each in texts().items()}
    else:
        try:
            whole = kv.tokenize(model, text.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {text}: {error}") from None
        begin = kv.tokenize(model, "")
        body = whole[len(begin) :]
        size = WINDOW_TOKENS - len(begin)
        count = min(max(len(body) // size, 1), MAX_WINDOWS)
        firsts = [index * max(len(body) - size, 0) // max(count - 1, 1) for index in range(count)]
        tokens = {f"{text.name} {first}": [*begin, *body[first : first + size]] for first in firsts}
    for name, ids in tokens.items():
        if len(ids) <= 2 * kv.CONTINUATION_TOKENS:
            raise ConfigError(f"text {name!r} has {len(ids)} tokens; it needs over {2 * kv.CONTINUATION_TOKENS}")
    return {name: (ids[: -kv.CONTINUATION_TOKENS], ids[-kv.CONTINUATION_TOKENS :]) for name, ids in tokens.items()}


def compare(
    contexts: dict[CellType, Context],
    prompt: PromptKV,
    expected: Logits,
    greedy: list[int],
    codecs: Sequence[Codec],
    geometry: Any,
) -> Iterator[Sample]:
    """Each way's divergence from the reference's logits ``expected``, its likelihoods, and where its own words part
    from the reference's ``greedy`` ones; for the codecs also their divergence from native prefill.
    """
    from measurements import kv

    about = {"prompt": prompt.name, "prompt_tokens": len(prompt.prompt)}
    truth = prompt.continuation
    about["nll_reference"] = negative_log_likelihood(expected, truth)
    plain = contexts["f16"]
    native = kv.own_predictions(plain, prompt)
    words = kv.greedy(plain, prompt, [], len(greedy))
    yield about | {"way": NATIVE} | _against(expected, native, truth, greedy, words)
    frames = list(kv.frames_of(prompt, geometry, Link()))
    for codec in codecs:
        chunks, _ = kv.through(codec, frames)
        context = contexts[codec.lands_in[0]]
        got = kv.predictions(context, prompt, chunks)
        words = kv.greedy(context, prompt, chunks, len(greedy))
        kl, top1 = kv.divergence(native, got)
        to_native = {"kl_to_native": kl, "top1_to_native": top1}
        yield about | {"way": codec.name} | _against(expected, got, truth, greedy, words) | to_native


def _against(expected: Logits, got: Logits, truth: list[int], greedy: list[int], words: list[int]) -> Sample:
    from measurements import kv

    kl, top1 = kv.divergence(expected, got)
    return {
        "kl": kl,
        "top1": top1,
        "nll": negative_log_likelihood(got, truth),
        "greedy_divergence_tokens": same_words(greedy, words),
    }


def negative_log_likelihood(logits: Logits, truth: Sequence[int]) -> float:
    """Mean over tokens of -log p(true token), in nats, of logits ``[tokens, vocab_size]``."""
    from measurements import kv

    rows = kv.log_softmax(logits.astype(np.float64))
    return float(-rows[np.arange(len(truth)), list(truth)].mean())


def same_words(expected: Sequence[int], got: Sequence[int]) -> int:
    """Tokens before the first that differs; all of them if none does."""
    return next((at for at, (one, other) in enumerate(zip(expected, got, strict=True)) if one != other), len(expected))


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """Means over prompts, whose continuations are equally long; medians of the greedy divergence."""
    by_way: dict[str, list[Sample]] = {}
    for sample in samples:
        by_way.setdefault(sample["way"], []).append(sample)
    rows = {
        way: {
            "kl_split": statistics.fmean(sample["kl"] for sample in found),
            "top1": statistics.fmean(sample["top1"] for sample in found),
            "greedy_divergence_tokens": statistics.median(sample["greedy_divergence_tokens"] for sample in found),
            "perplexity": float(np.exp(statistics.fmean(sample["nll"] for sample in found))),
        }
        | {
            name: statistics.fmean(sample[name] for sample in found)
            for name in ("kl_to_native", "top1_to_native")
            if way != NATIVE
        }
        for way, found in by_way.items()
    }
    native = rows.pop(NATIVE)
    reference_nll = statistics.fmean(sample["nll_reference"] for sample in by_way[NATIVE])
    return {
        "prompts": len(by_way[NATIVE]),
        "kl_native": native["kl_split"],
        "top1_native": native["top1"],
        "greedy_divergence_tokens_native": native["greedy_divergence_tokens"],
        "perplexity_native": native["perplexity"],
        "perplexity_reference": float(np.exp(reference_nll)),
        **rows,
    }


def _codecs(summary: dict[str, Any]) -> list[str]:
    return [name for name in CODECS if name in summary]


def table(summary: dict[str, Any], model: str) -> Table:
    """The summary for people."""
    title = (
        f"{model} against fp32, {summary['prompts']} prompts; perplexity of fp32 {summary['perplexity_reference']:.3f}"
    )
    made = Table(title=title, title_justify="left")
    made.add_column("KV")
    for column in ("mean KL", "top-1", "same words", "perplexity", "KL to native", "top-1 of native"):
        made.add_column(column, justify="right")
    native = [summary[f"{name}_native"] for name in ("kl", "top1", "greedy_divergence_tokens", "perplexity")]
    rows = [(NATIVE, [*native, 0.0, 1.0]), *((name, list(summary[name].values())) for name in _codecs(summary))]
    for name, (kl, top1, words, perplexity, kl_to_native, top1_to_native) in rows:
        shown = f"{kl:.2e}", f"{top1:.3f}", f"{words:g}", f"{perplexity:.3f}"
        made.add_row(name, *shown, f"{kl_to_native:.2e}", f"{top1_to_native:.3f}")
    return made


def draw(summary: dict[str, Any], path: Path) -> None:
    """KL and perplexity by codec, native prefill as a line; the format is by ``path``'s name."""
    from matplotlib.figure import Figure

    names = _codecs(summary)
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(names, [summary[name]["kl_split"] for name in names])
    left.axhline(summary["kl_native"], color="grey", linestyle="--", label=NATIVE)
    left.set(yscale="log", ylabel="mean KL to fp32, nats", title="divergence")
    right.plot(names, [summary[name]["perplexity"] for name in names], "o")
    right.axhline(summary["perplexity_native"], color="grey", linestyle="--", label=NATIVE)
    right.axhline(summary["perplexity_reference"], color="black", linestyle=":", label="fp32")
    right.set(ylabel="perplexity", title="the true continuation")
    for axes in (left, right):
        axes.tick_params("x", rotation=35)
        axes.legend()
    picture.save(figure, path)
