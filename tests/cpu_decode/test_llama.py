"""What the transplant rests on: llama.cpp takes our state, whole or in chunks, and computes the same logits."""

from __future__ import annotations

import llama_cpp
import msgspec
import numpy as np
import pytest

from cpu_decode.llama import Batch, Context, Model
from cpu_decode.state import ChunkState, state_bytes
from tests.cpu_decode.native_kv import chunk_of, elements_of, prefill
from tests.isthmus import tiny_gguf
from transfer.errors import EngineError, UnsplittableError
from transfer.layout import CELL_ROWS

PROMPT = [(7 * i + 3) % 40_000 for i in range(200)]


def last_logits(context, seq_id, position, token):
    batch = Batch(1)
    row = batch.add(seq_id, position, [token], want_logits=True)
    context.decode(batch)
    return context.logits(row)


@pytest.mark.parametrize("cell_type", CELL_ROWS)
def test_our_state_is_byte_for_byte_llama_cpps_own(model, geometry, cell_type):
    context = Context(model, num_cells=256, max_sequences=1, batch_tokens=256, threads=1, cell_type=cell_type)
    prefill(context, 0, PROMPT)
    native = context.state(0)
    context.close()
    elements = elements_of(native, geometry, len(PROMPT), cell_type)
    assert chunk_of(geometry, elements, 0, len(PROMPT), cell_type).buffer.tobytes() == native.tobytes()


@pytest.mark.parametrize("cell_type", CELL_ROWS)
def test_chunked_injection_gives_the_same_logits_bit_for_bit(model, geometry, cell_type):
    native = Context(model, num_cells=256, max_sequences=1, batch_tokens=256, threads=1, cell_type=cell_type)
    prefill(native, 0, PROMPT)
    elements = elements_of(native.state(0), geometry, len(PROMPT), cell_type)
    native.close()
    logits = []
    for chunk_tokens in (len(PROMPT), 64, 33):
        # A new context each: f16 logits depend on which cells are filled, and a new one fills them from the first on.
        fresh = Context(model, num_cells=1024, max_sequences=2, batch_tokens=64, threads=1, cell_type=cell_type)
        for start in range(0, len(PROMPT), chunk_tokens):
            end = min(start + chunk_tokens, len(PROMPT))
            fresh.inject(chunk_of(geometry, elements, start, end, cell_type), 0)
        assert fresh.cached_tokens(0) == len(PROMPT)
        assert np.array_equal(elements_of(fresh.state(0), geometry, len(PROMPT), cell_type), elements)
        logits.append(last_logits(fresh, 0, len(PROMPT), 42))
        fresh.close()
    assert np.array_equal(logits[1], logits[0])
    assert np.array_equal(logits[2], logits[0])


def test_logits_are_those_of_their_row_whatever_is_between(model):
    """Rows without logits, a batch with fewer of them than the last, and one whose logits lie elsewhere."""
    context = Context(model, num_cells=512, max_sequences=3, batch_tokens=256, threads=1, cell_type="bf16")
    batch = Batch(256)
    first = batch.add(0, 0, PROMPT[:1], want_logits=1)
    second = batch.add(1, 0, PROMPT[:40], want_logits=2)
    third = batch.add(2, 0, PROMPT[:7], want_logits=1)
    context.decode(batch)
    together = [context.logits(row) for row in (first, second - 1, second, third)]
    alone = []
    for upto in (1, 39, 40, 7):
        context.trim(0, 0)
        batch.clear()
        row = batch.add(0, 0, PROMPT[:upto], want_logits=1)
        context.decode(batch)
        alone.append(context.logits(row))
    assert [row.argmax() for row in together] == [row.argmax() for row in alone]
    assert np.allclose(together, alone, atol=0.2)
    assert not np.allclose(together[1], together[2], atol=0.2)
    context.close()


def test_state_that_llama_cpp_refuses_leaves_no_cell_behind(context, geometry):
    chunk = ChunkState(np.zeros(state_bytes(geometry, 8, "bf16"), np.uint8), geometry, "bf16", 0, 8)
    chunk.buffer[0] ^= 1
    with pytest.raises(EngineError, match="took 0 of"):
        context.inject(chunk, 1)
    assert context.cached_tokens(1) == 0


def test_trim_frees_the_tail_and_then_everything(context):
    prefill(context, 2, PROMPT)
    context.trim(2, 150)
    assert context.cached_tokens(2) == 150
    context.trim(2, 0)
    assert context.cached_tokens(2) == 0


def test_windows_and_rope_that_the_file_did_not_announce_are_refused(model, geometry, monkeypatch):
    assert model.checked(geometry) is geometry
    with pytest.raises(UnsplittableError, match="a window of 0 positions in some layers of this model, where 9"):
        model.checked(msgspec.structs.replace(geometry, sliding_window=9))
    monkeypatch.setattr(llama_cpp, "llama_model_rope_type", lambda _: 8)
    with pytest.raises(UnsplittableError, match="rope type 8"):
        model.checked(geometry)


def test_pieces_join_to_text(model):
    # "Hello world" and a control token in SmolLM2's vocabulary.
    assert b"".join(map(model.piece, [19556, 905])) == b"Hello world"
    assert model.piece(model.end_tokens[0]) == b""


def test_weights_stay_as_long_as_a_context_computes_with_them(tmp_path, monkeypatch):
    freed = []
    free = llama_cpp.llama_model_free
    monkeypatch.setattr(llama_cpp, "llama_model_free", lambda handle: (freed.append(handle), free(handle)))
    model = Model(tiny_gguf.write_tiny_gguf(tmp_path / "tiny.gguf"))
    contexts = [
        Context(model, num_cells=256, max_sequences=1, batch_tokens=32, threads=1, cell_type="f16") for _ in range(2)
    ]
    model.close()
    contexts[0].close()
    assert not freed
    prefill(contexts[1], 0, [1, 2, 3])
    contexts[1].close()
    assert freed == [model.handle]
