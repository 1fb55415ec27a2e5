"""Real KV: prompts prefilled by llama.cpp, taken out of its cells, cut into frames, and put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpu_decode.llama import Batch, Context, Model
from cpu_decode.state import ChunkState, state_bytes
from transfer.codecs import CELL_ELEMENT, CODECS, Codec
from transfer.config import Link
from transfer.errors import ConfigError, EngineError
from transfer.frames import Element
from transfer.geometry import KVGeometry
from transfer.layout import CellType, Elements, Slab, layers_per_frame

# Tokens of each text that are not prompt but continuation, known to all who predict them.
CONTINUATION_TOKENS = 48
MAX_TOKENS = 2048

Logits = npt.NDArray[np.float32]


class PromptKV(NamedTuple):
    """A prompt, what follows it, and its KV: planes of ``[len(prompt), channels]``, K and V of each layer."""

    name: str
    prompt: list[int]
    continuation: list[int]
    planes: list[Elements]


class Frame(NamedTuple):
    """A slab and its elements, as the prefill node would encode them at once."""

    first_layer: int
    slab: Slab
    elements: Elements


def tokenize(model: Model, text: str) -> list[int]:
    """Token ids of ``text``, special tokens parsed."""
    import llama_cpp

    raw = text.encode()
    ids = (llama_cpp.llama_token * (len(raw) + 8))()
    count = llama_cpp.llama_tokenize(
        llama_cpp.llama_model_get_vocab(model.handle), raw, len(raw), ids, len(ids), True, True
    )
    if count < 0:
        raise EngineError(f"llama.cpp needs {-count} tokens for a text of {len(raw)} bytes")
    return list(ids[:count])


def prefill(
    model: Model, geometry: KVGeometry, texts: dict[str, str], cell_type: CellType, threads: int
) -> Iterator[PromptKV]:
    """Prefill each text but its last tokens with cells of ``cell_type``, whose rows are the planes; vLLM holds bf16."""
    context = Context(
        model, num_cells=MAX_TOKENS, max_sequences=1, batch_tokens=MAX_TOKENS, threads=threads, cell_type=cell_type
    )
    try:
        for name, text in texts.items():
            ids = tokenize(model, text)[:MAX_TOKENS]
            if len(ids) <= 2 * CONTINUATION_TOKENS:
                raise ConfigError(f"text {name!r} has {len(ids)} tokens; it needs over {2 * CONTINUATION_TOKENS}")
            prompt, continuation = ids[:-CONTINUATION_TOKENS], ids[-CONTINUATION_TOKENS:]
            batch = Batch(len(prompt))
            batch.add(0, 0, prompt, want_logits=False)
            context.decode(batch)
            state = context.state(0)
            context.trim(0, 0)
            if state.size != state_bytes(geometry, len(prompt), cell_type):
                raise EngineError(f"state of {len(prompt)} tokens has {state.size} bytes")
            # Laying the same chunk out over the state writes what is there already, and finds the rows.
            chunk = ChunkState(state, geometry, cell_type, 0, len(prompt))
            yield PromptKV(name, prompt, continuation, chunk.planes(0, geometry.num_layers))
    finally:
        context.close()


def rounded_to_bf16(kv: PromptKV) -> PromptKV:
    """``kv``, whose planes are f16, with every element rounded to bf16."""
    planes = [np.empty_like(plane) for plane in kv.planes]
    for plane, rounded in zip(kv.planes, planes, strict=True):
        CODECS["raw"].decode(plane.tobytes(), Element.F16, Element.BF16, [rounded], range(len(kv.prompt)))
    return kv._replace(planes=planes)


def frames_of(kv: PromptKV, geometry: KVGeometry, link: Link) -> Iterator[Frame]:
    """Cut ``kv`` into the frames that the prefill node would make of it."""
    for start in range(0, len(kv.prompt), link.chunk_tokens):
        tokens = range(start, min(start + link.chunk_tokens, len(kv.prompt)))
        group = layers_per_frame(geometry, len(tokens), link.frame_mib << 20)
        for first in range(0, geometry.num_layers, group):
            planes = kv.planes[2 * first : 2 * (first + group)]
            rows = [plane.reshape(len(kv.prompt), -1)[tokens.start : tokens.stop].reshape(-1) for plane in planes]
            yield Frame(first, Slab(geometry, len(planes) // 2, tokens), np.concatenate(rows))


def chunks_for(frames: Sequence[Frame], cell_type: CellType) -> dict[int, ChunkState]:
    """Empty chunks of cells of ``cell_type`` for all ``frames``, by their first token."""
    return {
        tokens.start: ChunkState(
            np.zeros(state_bytes(geometry, len(tokens), cell_type), np.uint8),
            geometry,
            cell_type,
            tokens.start,
            len(tokens),
        )
        for geometry, _, tokens in (frame.slab for frame in frames if frame.first_layer == 0)
    }


def through(codec: Codec, frames: Sequence[Frame], element: Element = Element.BF16) -> tuple[list[ChunkState], int]:
    """The chunks that ``frames`` become on the decode node, and the bytes of all payloads.

    The cells are of the first type that ``codec`` lands in: f16, or its own.
    """
    cell_type = codec.lands_in[0]
    chunks = chunks_for(frames, cell_type)
    wire_bytes = 0
    for frame in frames:
        payload = codec.encode(frame.elements, element, frame.slab)
        wire_bytes += len(payload)
        tokens = frame.slab.tokens
        outs = chunks[tokens.start].planes(frame.first_layer, frame.slab.num_layers)
        codec.decode(payload, element, CELL_ELEMENT[cell_type], outs, tokens)
    return list(chunks.values()), wire_bytes


def whole(kv: PromptKV, geometry: KVGeometry, cell_type: CellType) -> ChunkState:
    """The rows of ``kv`` as they are, as one chunk of cells of ``cell_type``."""
    count = len(kv.prompt)
    chunk = ChunkState(np.zeros(state_bytes(geometry, count, cell_type), np.uint8), geometry, cell_type, 0, count)
    for out, plane in zip(chunk.planes(0, geometry.num_layers), kv.planes, strict=True):
        out[:] = plane
    return chunk


def predictions(context: Context, kv: PromptKV, chunks: Sequence[ChunkState]) -> Logits:
    """Logits for every token of the continuation, fp32 ``[CONTINUATION_TOKENS, vocab_size]``, given ``chunks``.

    The last token of the prompt is computed again, as the decode worker does where it samples the first token.
    """
    for chunk in chunks:
        context.inject(chunk, 0)
    return _continue(context, kv)


def own_predictions(context: Context, kv: PromptKV) -> Logits:
    """The same, given what the model of ``context`` makes of the prompt itself."""
    batch = Batch(len(kv.prompt))
    batch.add(0, 0, kv.prompt, want_logits=False)
    context.decode(batch)
    return _continue(context, kv)


def greedy(context: Context, kv: PromptKV, chunks: Sequence[ChunkState], count: int) -> list[int]:
    """The ``count`` most likely tokens after the prompt, one after another, given ``chunks``; its own KV if none."""
    batch = Batch(len(kv.prompt))
    if chunks:
        for chunk in chunks:
            context.inject(chunk, 0)
        context.trim(0, len(kv.prompt) - 1)
        row = batch.add(0, len(kv.prompt) - 1, kv.prompt[-1:], want_logits=True)
    else:
        row = batch.add(0, 0, kv.prompt, want_logits=True)
    made: list[int] = []
    while True:
        context.decode(batch)
        made.append(int(context.logits(row).argmax()))
        if len(made) == count:
            context.trim(0, 0)
            return made
        batch.clear()
        row = batch.add(0, len(kv.prompt) + len(made) - 1, made[-1:], want_logits=True)


def _continue(context: Context, kv: PromptKV) -> Logits:
    last = len(kv.prompt) - 1
    context.trim(0, last)
    batch = Batch(len(kv.continuation))
    for offset, token in enumerate([kv.prompt[-1], *kv.continuation[:-1]]):
        batch.add(0, last + offset, [token], want_logits=True)
    context.decode(batch)
    logits = np.stack([context.logits(row) for row in range(batch.size)])
    context.trim(0, 0)
    return logits


def divergence(expected: Logits, got: Logits) -> tuple[float, float]:
    """Mean KL(expected || got) in nats, and the share of rows whose most likely token is the same."""
    p, q = log_softmax(expected.astype(np.float64)), log_softmax(got.astype(np.float64))
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    return float(kl.mean()), float((expected.argmax(axis=1) == got.argmax(axis=1)).mean())


def log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Log probabilities of rows of logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    normal: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normal
