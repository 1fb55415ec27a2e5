"""A context in which every sequence has a stream of cells to itself: its attention looks at no other's.

Steps over several sequences are faster so, and the rest is harder (``llama_kv_cache`` in llama.cpp's ``src``): a
sequence's state replaces what the stream held, so that KV comes whole or not at all (``gathering.py``); no cell is
anybody else's; and a batch is computed in one go only where the numbers of its sequences ascend without a gap.

Outside of this file states are those of a unified cache, so that both kinds of context exchange blocks. Flash attention
may be off, which is faster still on some processors: then V lies transposed in the cells, and is turned on the way, and
logits depend a little on how many rows are computed together (KL of 0.01 between two ways to divide a prompt); with it,
bf16 and q8_0 cells give the same to the bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from cpu_decode.llama import Context, Model, Saver, pointer
from cpu_decode.state import ChunkState, StateBlob, cut, is_quantized
from cpu_decode.whole_state import Whole, out_of_streams
from transfer.config import Decode
from transfer.errors import ConfigError, EngineError
from transfer.layout import CellType


def open_context(model: Model, decode: Decode, batch_tokens: int, threads: int, batch_threads: int = 0) -> Context:
    """A context with the cells that ``decode`` describes; raises :class:`ConfigError` if it cannot be."""
    settings: dict[str, Any] = {
        "num_cells": decode.num_cells,
        "max_sequences": decode.max_sequences,
        "batch_tokens": batch_tokens,
        "threads": threads,
        "batch_threads": batch_threads,
        "cell_type": decode.cell_type,
    }
    if decode.cell_layout == "streams":
        return StreamContext(model, **settings, flash_attention=decode.flash_attention)
    if not decode.flash_attention:
        raise ConfigError(
            "in unified cells KV lands as flash attention reads it; set [decode] flash_attention to true, or "
            "cell_layout to streams"
        )
    return Context(model, **settings)


class StreamContext(Context):
    """As many streams of cells as there are sequences.

    Raises :class:`ConfigError` for models with sliding windows: their other caches are not laid out like this one.
    """

    unified = False

    def __init__(
        self,
        model: Model,
        *,
        num_cells: int,
        max_sequences: int,
        batch_tokens: int,
        threads: int,
        cell_type: CellType,
        batch_threads: int = 0,
        flash_attention: bool = True,
    ) -> None:
        if not flash_attention and is_quantized(cell_type):
            raise ConfigError(
                f"{cell_type} cells need flash attention; set [decode] flash_attention to true, or cell_type to f16"
            )
        if llama_cpp.llama_model_n_swa(model.handle):
            raise ConfigError(
                "layers of this model have a sliding window, whose KV cannot be put into streams; set [decode] "
                "cell_layout to unified"
            )
        super().__init__(
            model,
            num_cells=num_cells,
            max_sequences=max_sequences,
            batch_tokens=batch_tokens,
            threads=threads,
            cell_type=cell_type,
            batch_threads=batch_threads,
            flash_attention=flash_attention,
        )
        self._streams, self.flash_attention = max_sequences, flash_attention
        self.sequence_cells = int(llama_cpp.llama_n_ctx_seq(self.handle))
        self.num_cells = max_sequences * self.sequence_cells

    def whole(self, like: ChunkState | StateBlob, num_tokens: int) -> Whole:
        """Room for the state of ``num_tokens`` tokens that comes in pieces such as ``like``."""
        return Whole(like, num_tokens, self._streams, transposed=not self.flash_attention)

    def put(self, whole: Whole, seq_id: int) -> None:
        """Let ``seq_id`` hold ``whole`` and nothing else. Raises :class:`EngineError` and leaves no cell behind."""
        state = whole.finished(self._streams, transposed=not self.flash_attention).buffer
        read = llama_cpp.llama_state_seq_set_data(self.handle, pointer(state), state.size, seq_id)
        if read != state.size:
            self.trim(seq_id, 0)
            raise EngineError(f"llama.cpp took {read} of {state.size} bytes of state of {whole.num_tokens} tokens")

    def inject(self, chunk: ChunkState | StateBlob, seq_id: int) -> None:
        """The same for ``chunk``, which must begin with the first token."""
        if chunk.start_token:
            raise EngineError(f"KV from token {chunk.start_token} on came alone; a stream takes a sequence whole")
        whole = self.whole(chunk, chunk.num_tokens)
        whole.add(chunk)
        self.put(whole, seq_id)

    def save(self, seq_id: int, tokens: range, buffer: npt.NDArray[np.uint8]) -> None:
        """See :meth:`Context.save`; all of the sequence is read for it."""
        self.saver(seq_id)(tokens, buffer)

    def saver(self, seq_id: int) -> Saver:
        """:meth:`save` for several parts: all of the sequence is read once, for the first of them."""
        return _Snapshot(self, seq_id).save

    def share(self, donor: int, seq_id: int, num_tokens: int) -> None:
        """Let ``seq_id`` hold a copy of the first ``num_tokens`` positions of ``donor``."""
        state = self.state(donor)
        self.inject(StateBlob(state, state.size, 0, self.cached_tokens(donor)), seq_id)
        self.trim(seq_id, num_tokens)

    def state(self, seq_id: int) -> npt.NDArray[np.uint8]:
        """The sequence's state, uint8, as a unified cache would write it."""
        return out_of_streams(super().state(seq_id), self._streams, seq_id)


class _Snapshot:
    """What a sequence held when it was first asked for."""

    def __init__(self, context: StreamContext, seq_id: int) -> None:
        self._read = cache(lambda: context.state(seq_id))

    def save(self, tokens: range, buffer: npt.NDArray[np.uint8]) -> None:
        """See :meth:`Context.save`."""
        state = self._read()
        part = cut(StateBlob(state, state.size, 0, 0), tokens)
        if part.num_bytes != buffer.size:
            raise EngineError(f"llama.cpp holds {part.num_bytes} of {buffer.size} bytes of state at tokens {tokens}")
        buffer[:] = part.buffer
