"""Streams of cells hold what a unified cache would, byte for byte, and give the same logits but for f16 cells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cpu_decode.admission import Admission, allocated_cells
from cpu_decode.llama import Context, Model
from cpu_decode.reservations import Reservations
from cpu_decode.reuse import PrefixCache
from cpu_decode.state import CELL, StateBlob, cut, state_bytes
from cpu_decode.streams import StreamContext, open_context
from tests.cpu_decode.asking import ask, ask_for_choices
from tests.cpu_decode.native_kv import chunk_of, elements_of, prefill
from tests.cpu_decode.serving import serving
from tests.cpu_decode.test_worker import eventually
from transfer.config import Decode, Link
from transfer.errors import ConfigError, EngineError, RequestError
from transfer.layout import CellType
from transfer.messages import Sampling

PROMPT = [(11 * i + 5) % 40_000 for i in range(200)]
STREAMS = 3


@pytest.fixture(
    params=[("bf16", True), ("bf16", False), ("q8_0", True)], ids=["flash attention", "transposed V", "q8_0 cells"]
)
def shape(request) -> tuple[CellType, bool]:
    return request.param


@pytest.fixture
def streams(shape, model: Model) -> Iterator[StreamContext]:
    cell_type, flash_attention = shape
    context = StreamContext(
        model,
        num_cells=STREAMS * 300,
        max_sequences=STREAMS,
        batch_tokens=256,
        threads=1,
        cell_type=cell_type,
        flash_attention=flash_attention,
    )
    yield context
    context.close()


@pytest.fixture
def unified(shape, model: Model) -> Iterator[Context]:
    """Cells of the same type, shared by all sequences."""
    context = Context(model, num_cells=1024, max_sequences=2, batch_tokens=256, threads=1, cell_type=shape[0])
    yield context
    context.close()


def same(state: np.ndarray, other: np.ndarray) -> bool:
    """Whether two states are equal but for the numbers of the sequences that they were read from."""
    return np.array_equal(*(without_sequences(each) for each in (state, other)))


def without_sequences(state: np.ndarray) -> np.ndarray:
    state = state.copy()
    state[4:8] = 0
    count = int(state[12:16].view(np.uint32)[0])
    state[16 : 16 + 12 * count].view(CELL)["sequence"] = 0
    return state


def blob_of(state: np.ndarray) -> StateBlob:
    return StateBlob(state, state.size, 0, len(PROMPT))


@pytest.mark.parametrize("seq_id", range(STREAMS))
def test_states_go_from_one_kind_of_context_to_the_other(unified, streams, seq_id):
    logits = prefill(unified, 1, PROMPT)
    theirs = prefill(streams, seq_id, PROMPT)
    state = unified.state(1)
    if streams.flash_attention:
        assert np.array_equal(theirs, logits)
        assert same(streams.state(seq_id), state)
    assert np.abs(theirs - logits).max() < 1
    other = (seq_id + 1) % STREAMS
    streams.inject(blob_of(state), other)
    assert streams.cached_tokens(other) == len(PROMPT)
    assert same(streams.state(other), state)


def test_a_sequence_that_came_in_pieces_is_the_same_whole(shape, unified, streams, geometry):
    cell_type, _ = shape
    prefill(unified, 0, PROMPT)
    state = unified.state(0)
    elements = elements_of(state, geometry, len(PROMPT), cell_type)
    first = cut(blob_of(state), range(70))
    whole = streams.whole(first, len(PROMPT))
    assert whole.buffer.size == state_bytes(geometry, len(PROMPT), cell_type) + 4 * (STREAMS - 1)
    whole.add(first)
    for start in (70, 134):
        whole.add(chunk_of(geometry, elements, start, start + 64, cell_type))
    # Two tokens never came.
    assert whole.num_tokens == 198
    streams.put(whole, 2)
    assert same(streams.state(2), cut(blob_of(state), range(198)).buffer)
    whole = streams.whole(first, len(PROMPT))
    whole.add(blob_of(state))
    streams.put(whole, 1)
    assert same(streams.state(1), state)


def test_parts_are_saved_and_copies_are_shared(streams):
    prefill(streams, 1, PROMPT)
    state = streams.state(1)
    save = streams.saver(1)
    for tokens in (range(64), range(64, 200)):
        expected = cut(blob_of(state), tokens)
        buffer = np.empty(expected.num_bytes, np.uint8)
        save(tokens, buffer)
        assert np.array_equal(buffer, expected.buffer)
    with pytest.raises(EngineError, match="at tokens range"):
        streams.save(1, range(64, 201), np.empty(expected.num_bytes + 1, np.uint8))
    streams.share(1, 0, 150)
    assert (streams.cached_tokens(0), streams.cached_tokens(1)) == (150, 200)
    assert same(streams.state(0), cut(blob_of(state), range(150)).buffer)


def test_what_a_stream_cannot_take_leaves_no_cell_behind(unified, streams):
    prefill(unified, 0, PROMPT)
    state = unified.state(0)
    with pytest.raises(EngineError, match="a stream takes a sequence whole"):
        streams.inject(cut(blob_of(state), range(64, 128)), 0)
    # The type of the first plane's rows.
    state[16 + 12 * len(PROMPT) + 8] ^= 1
    with pytest.raises(EngineError, match="took 0 of"):
        streams.inject(blob_of(state), 0)
    assert streams.cached_tokens(0) == 0


def test_without_flash_attention_cells_must_be_streams_of_16_bits(model):
    with pytest.raises(ConfigError, match="cell_layout to streams"):
        open_context(model, Decode(flash_attention=False), 32, 1)
    with pytest.raises(ConfigError, match="cell_type to f16"):
        open_context(model, Decode(flash_attention=False, cell_layout="streams", cell_type="q8_0"), 32, 1)


def test_cells_are_divided_and_rounded_up_as_llama_cpp_does(streams):
    decode = Decode(num_cells=STREAMS * 300, max_sequences=STREAMS, cell_layout="streams")
    assert streams.cells == (allocated_cells(decode), 512, False)
    assert allocated_cells(Decode(num_cells=1000)) == 1000
    admission = Admission(*streams.cells[:1], STREAMS, 512)
    assert [admission.admit(512) for _ in range(STREAMS)] == [0, 1, 2]
    admission.release(1)
    admission.release(0)
    assert admission.admit(1) == 0
    with pytest.raises(RequestError, match="need 513 cells, the decode worker has 512 for each of its 3 sequences"):
        admission.require(513)


def test_a_sliding_window_is_refused_with_the_reason(tmp_path):
    from tests.isthmus import tiny_gguf

    gguf = tiny_gguf.write_tiny_gguf(tmp_path / "tiny.gguf")
    model = Model(Path(gguf))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("llama_cpp.llama_model_n_swa", lambda _: 512)
            with pytest.raises(ConfigError, match=r"sliding window.*cell_layout to unified"):
                open_context(model, Decode(cell_layout="streams"), 32, 1)
    finally:
        model.close()


def test_landing_memory_must_hold_a_stream(model, geometry, streams):
    decode = Decode(cell_layout="streams", cell_type="bf16", landing_mib=10)
    with pytest.raises(ConfigError, match="raise landing_mib or lower num_cells"):
        Reservations(model, streams.cells, geometry, decode, Link(chunk_tokens=64), None, None)


@pytest.mark.parametrize("flash_attention", [True, False])
def test_prompts_reuse_ram_while_others_run_and_never_cells(model, geometry, flash_attention):
    long, short = (Sampling(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (700, 8))
    # Without flash attention logits depend on how many rows are computed together, up to 1 here: the words that repeat
    # are likelier by 4.
    prompt = (model.tokenize(b"Hello world! ") * 60)[:203]
    settings = {"cell_layout": "streams", "num_cells": 10_240, "flash_attention": flash_attention}
    with serving(model, geometry, "bf16", pool_mib=64, **settings) as keeping:
        fresh = ask(keeping, short, prompt, reuse=False)
        first = keeping.client.reserve(prompt[:200], long, "local")
        keeping.client.start(first)
        keeping.client.next_tokens(first)
        eventually(lambda: keeping.client.status().retained_bytes > 0)
        answers, report = ask_for_choices(keeping, short, 2, prompt)
        assert answers == [fresh] * 2
        assert (report.kv_reused_tokens, report.restored_tokens) == (192, 192)
        keeping.client.abort(first)
        eventually(lambda: keeping.client.status().used_cells == 0)
        assert keeping.empty
    assert PrefixCache(geometry, "bf16", 1 << 20, unified=False)._lends is False
