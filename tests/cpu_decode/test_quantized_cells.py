"""The rows that we rotate and quantize are llama.cpp's own, and predict as well as those."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cpu_decode.geometry import read_geometry
from cpu_decode.llama import Batch, Context, Model
from cpu_decode.state import ChunkState, row_bytes, state_bytes
from measurements import kv, prompts
from tests.cpu_decode.native_kv import elements_of, prefill
from tests.cpu_decode.serving import LINK, serving
from tests.cpu_decode.test_worker import GREEDY, send_kv
from tests.isthmus import tiny_gguf
from tests.transfer import codec_reference as reference
from transfer.codecs import CODECS, landing_codecs
from transfer.config import Link
from transfer.errors import CodecError, ConfigError
from transfer.geometry import KVGeometry
from transfer.layout import CELL_ROWS, CellRow, CellType

QUANTIZED: tuple[CellType, ...] = ("q8_0", "k8v4", "q4_0")
PROMPT = [(7 * i + 3) % 250 for i in range(100)]

cell_types = pytest.mark.parametrize("cell_type", QUANTIZED)


def first_layer(model: Model, geometry: KVGeometry, cell_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the K rows and of the V rows that llama.cpp computes for ``PROMPT``, before any attention."""
    context = Context(model, num_cells=256, max_sequences=1, batch_tokens=256, threads=1, cell_type=cell_type)
    prefill(context, 0, PROMPT)
    rows = elements_of(context.state(0), geometry, len(PROMPT), cell_type)[0].view(np.uint8)
    context.close()
    k, v = np.split(rows, [len(PROMPT) * row_bytes(geometry, cell_type)[0]])
    return k, v


# SmolLM2's heads, and random weights with heads of 2, 3 and 4 times their size.
@pytest.fixture(scope="module", params=[64, 128, 192, 256])
def any_model(request, default_pair, tmp_path_factory):
    gguf = Path(default_pair.gguf)
    if request.param != 64:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny_gguf, "HIDDEN", request.param * tiny_gguf.HEADS)
            gguf = tiny_gguf.write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    model = Model(gguf)
    geometry = read_geometry(gguf)
    assert geometry.head_dim_k == geometry.head_dim_v == request.param
    yield model, geometry
    model.close()


@cell_types
def test_rotated_rows_are_llama_cpps_own(any_model, cell_type, monkeypatch):
    model, geometry = any_model
    # Only fp32 cells hold what llama.cpp itself rotates: 16 bits have lost what decides close codes.
    monkeypatch.setitem(CELL_ROWS, "f32", (CellRow(0, 1, 4), CellRow(0, 1, 4)))
    exact = first_layer(model, geometry, "f32")
    native = first_layer(model, geometry, cell_type)
    sizes = reference.rotation(geometry.head_dim_k), 64
    forms = reference.ROW_FORMS[f"rows_{cell_type}"]
    for values, rows, size, form in zip(exact, native, sizes, forms, strict=True):
        values = values.view(np.float32)
        ours = np.frombuffer(reference.rows_of(reference.rotate(values, size), form), np.uint8)
        assert np.mean(ours == rows) > 0.999
        unrotated = np.frombuffer(reference.rows_of(values, form), np.uint8)
        assert np.mean(unrotated == rows) < 0.2


# Mean KL in nats over the continuation; what is native quantizes as it goes, layer by layer.
@pytest.mark.parametrize(("cell_type", "bound"), [("q8_0", 5e-3), ("k8v4", 2e-2), ("q4_0", 2e-1)])
def test_landed_rows_predict_as_well_as_native_ones(model, geometry, cell_type, bound):
    text = {"prose": prompts.texts()["prose"][:2400]}
    (sent,) = kv.prefill(model, geometry, text, "bf16", 2)
    (native,) = kv.prefill(model, geometry, text, cell_type, 2)
    frames = list(kv.frames_of(sent, geometry, Link(chunk_tokens=256)))
    plain, _ = kv.through(CODECS["raw"], frames)
    (codec,) = landing_codecs(cell_type)
    landed, _ = kv.through(CODECS[codec], frames)
    unrotated = [whole_chunk(geometry, sent, cell_type)]
    logits = {}
    for kind, chunks in (("f16", plain), (cell_type, landed)):
        context = Context(model, num_cells=2048, max_sequences=1, batch_tokens=64, threads=2, cell_type=kind)
        logits[kind] = kv.predictions(context, sent, chunks)
        if kind == cell_type:
            own = kv.predictions(context, native, [kv.whole(native, geometry, cell_type)])
            wrong = kv.predictions(context, sent, unrotated)
        context.close()
    expected = logits["f16"]
    kl, _ = kv.divergence(expected, logits[cell_type])
    native_kl, _ = kv.divergence(expected, own)
    wrong_kl, _ = kv.divergence(expected, wrong)
    assert kl < bound
    assert kl < 2 * native_kl + 1e-3
    assert wrong_kl > 1


def whole_chunk(geometry, sent, cell_type):
    """``sent`` quantized without rotation."""
    count = len(sent.prompt)
    chunk = ChunkState(np.zeros(state_bytes(geometry, count, cell_type), np.uint8), geometry, cell_type, 0, count)
    forms = reference.ROW_FORMS[f"rows_{cell_type}"] * geometry.num_layers
    for out, plane, form in zip(chunk.planes(0, geometry.num_layers), sent.planes, forms, strict=True):
        out.view(np.uint8)[:] = np.frombuffer(reference.rows_of(reference.to_float(plane, "bf16"), form), np.uint8)
    return chunk


@pytest.mark.parametrize("cell_type", ["q8_0", "k8v4"])
def test_a_worker_with_quantized_cells_continues_what_lands(model, context, geometry, cell_type):
    prompt = [(11 * i + 5) % 40_000 for i in range(150)]
    (codec,) = landing_codecs(cell_type)
    with serving(model, geometry, cell_type) as running:
        with pytest.raises(CodecError, match=f"raw cannot land in {cell_type} cells; use {codec}"):
            running.client.reserve(prompt, GREEDY, "kv")
        ticket = running.client.reserve(prompt, GREEDY, "kv", codec=codec)
        first = send_kv(running, context, ticket, prompt)
        running.client.start(ticket, first)
        ids, _, last = running.client.collect(ticket)
    assert last.report.kv_wire_bytes < 0.6 * last.report.kv_raw_bytes
    assert ids == [first, *greedily(model, geometry, prompt, first, cell_type, context)]


def greedily(model, geometry, prompt, first, cell_type, context):
    """The tokens after ``first``, from the same rows injected by hand."""
    prefill(context, 0, prompt)
    whole = ChunkState(context.state(0), geometry, "bf16", 0, len(prompt))
    context.trim(0, 0)
    sent = kv.PromptKV("sent", prompt, [], whole.planes(0, geometry.num_layers))
    codec = CODECS[landing_codecs(cell_type)[0]]
    chunks, _ = kv.through(codec, list(kv.frames_of(sent, geometry, LINK)))
    landed = Context(model, num_cells=4096, max_sequences=1, batch_tokens=64, threads=1, cell_type=cell_type)
    for chunk in chunks:
        landed.inject(chunk, 0)
    ids = [first]
    while len(ids) < GREEDY.max_tokens:
        batch = Batch(1)
        row = batch.add(0, len(prompt) + len(ids) - 1, [ids[-1]], want_logits=True)
        landed.decode(batch)
        ids.append(int(landed.logits(row).argmax()))
    landed.close()
    return ids[1:]


@cell_types
def test_heads_that_llama_cpp_does_not_rotate_are_refused(geometry, cell_type):
    for change in ({"head_dim_k": 80}, {"head_dim_v": 96}, {"head_dim_k": 32, "head_dim_v": 32}):
        narrow = msgspec.structs.replace(geometry, **change)
        with pytest.raises(ConfigError, match=r"multiples of 64 .* set \[decode\] cell_type to f16 or bf16"):
            state_bytes(narrow, 1, cell_type)
        assert state_bytes(narrow, 1, "f16") > 0


@cell_types
def test_a_llama_cpp_that_does_not_rotate_is_refused(model, cell_type, monkeypatch):
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    with pytest.raises(ConfigError, match="LLAMA_ATTN_ROT_DISABLE"):
        Context(model, num_cells=256, max_sequences=1, batch_tokens=32, threads=1, cell_type=cell_type)
    assert os.environ["LLAMA_ATTN_ROT_DISABLE"] == "1"


@pytest.mark.parametrize(
    ("cell_type", "k_bytes", "v_bytes"), [("f16", 128, 128), ("q8_0", 68, 68), ("k8v4", 68, 36), ("q4_0", 36, 36)]
)
def test_row_sizes(geometry, cell_type, k_bytes, v_bytes):
    one_head = msgspec.structs.replace(geometry, num_kv_heads=1, head_dim_k=64, head_dim_v=64)
    assert row_bytes(one_head, cell_type) == (k_bytes, v_bytes)
