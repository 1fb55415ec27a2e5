"""How far predictions move when a model's weights are quantized: what codecs do to KV is measured against it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from cpu_decode.llama import Context, Model
from measurements import kv
from measurements.requantize import FileType, requantized


def q8_0_divergences(gguf: Path, prompts: Sequence[kv.PromptKV], threads: int) -> Iterator[tuple[float, float]]:
    """KL and top-1 (:func:`measurements.kv.divergence`) of each prompt's continuation, from fp32 weights to q8_0.

    Both are made of the weights of ``gguf``; each computes its own KV, in f16 cells. Needs about 5 bytes a weight of
    temporary disk and raises :class:`EngineError` where llama.cpp cannot write them.
    """
    with TemporaryDirectory() as folder:
        kinds = FileType.F32, FileType.Q8_0
        exact, rounded = (_predictions(gguf, Path(folder), kind, prompts, threads) for kind in kinds)
        for expected, got in zip(exact, rounded, strict=True):
            yield kv.divergence(expected, got)


def _predictions(
    gguf: Path, folder: Path, file_type: FileType, prompts: Sequence[kv.PromptKV], threads: int
) -> Iterator[kv.Logits]:
    model = Model(requantized(gguf, folder / f"{file_type.name}.gguf", file_type))
    context = Context(
        model, num_cells=kv.MAX_TOKENS, max_sequences=1, batch_tokens=kv.MAX_TOKENS, threads=threads, cell_type="f16"
    )
    for prompt in prompts:
        yield kv.own_predictions(context, prompt)
    context.close()
    model.close()
