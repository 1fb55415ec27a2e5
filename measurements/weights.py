"""How far predictions move when a model's weights are quantized: what codecs do to KV is measured against it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import llama_cpp

from cpu_decode.llama import Context, Model
from measurements import kv
from transfer.errors import EngineError

# enum llama_ftype (llama.cpp's include/llama.h). fp32 holds what any quantized weight stands for.
_F32, _Q8_0 = 0, 7


def q8_0_divergences(gguf: Path, prompts: Sequence[kv.PromptKV], threads: int) -> Iterator[tuple[float, float]]:
    """KL and top-1 (:func:`measurements.kv.divergence`) of each prompt's continuation, from fp32 weights to q8_0.

    Both are made of the weights of ``gguf``; each computes its own KV, in f16 cells. Needs about 5 bytes a weight of
    temporary disk and raises :class:`EngineError` where llama.cpp cannot write them.
    """
    with TemporaryDirectory() as folder:
        exact, rounded = (_predictions(gguf, Path(folder), kind, prompts, threads) for kind in (_F32, _Q8_0))
        for expected, got in zip(exact, rounded, strict=True):
            yield kv.divergence(expected, got)


def _predictions(
    gguf: Path, folder: Path, file_type: int, prompts: Sequence[kv.PromptKV], threads: int
) -> Iterator[kv.Logits]:
    model = Model(_requantized(gguf, folder / f"{file_type}.gguf", file_type))
    context = Context(
        model, num_cells=kv.MAX_TOKENS, max_sequences=1, batch_tokens=kv.MAX_TOKENS, threads=threads, cell_type="f16"
    )
    for prompt in prompts:
        yield kv.own_predictions(context, prompt)
    context.close()
    model.close()


def _requantized(gguf: Path, target: Path, file_type: int) -> Path:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.allow_requantize = True
    code = llama_cpp.llama_model_quantize(str(gguf).encode(), str(target).encode(), ctypes.byref(params))
    if code:
        raise EngineError(f"llama_model_quantize returned {code} for {target}; is there room for it?")
    return target
