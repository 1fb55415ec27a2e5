"""A context in which every sequence has a stream of cells to itself: its attention looks at no other's.

Steps over several sequences are faster so, and the rest is harder (``llama_kv_cache`` in llama.cpp's ``src``): a
sequence's state replaces what the stream held, so that KV comes whole or not at all (``gathering.py``); no cell is
anybody else's; and a batch is computed in one go only where the numbers of its sequences ascend without a gap.

Outside of this file states are those of a unified cache, so that both kinds of context exchange blocks: here they say
how many streams there are, and those of the other sequences, which hold nothing, follow as zeros.
"""

from __future__ import annotations

from functools import cache

import llama_cpp
import numpy as np
import numpy.typing as npt

from cpu_decode.llama import Context, Model, Saver, pointer
from cpu_decode.state import ChunkState, StateBlob, cut
from cpu_decode.whole_state import in_streams, out_of_streams
from transfer.config import CellLayout
from transfer.errors import ConfigError, EngineError
from transfer.layout import CellType


def context_of(layout: CellLayout) -> type[Context]:
    """The kind of context that has cells of ``layout``."""
    return StreamContext if layout == "streams" else Context


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
    ) -> None:
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
        )
        self.streams = max_sequences
        self.sequence_cells = int(llama_cpp.llama_n_ctx_seq(self.handle))
        self.num_cells = max_sequences * self.sequence_cells

    def inject(self, chunk: ChunkState | StateBlob, seq_id: int) -> None:
        """Let ``seq_id`` hold ``chunk``, from the first token on, and nothing else.

        Raises :class:`EngineError` and leaves no cell behind.
        """
        if chunk.start_token:
            raise EngineError(f"KV from token {chunk.start_token} on came alone; a stream takes a sequence whole")
        state = in_streams(chunk, self.streams)
        read = llama_cpp.llama_state_seq_set_data(self.handle, pointer(state), state.size, seq_id)
        if read != state.size:
            self.trim(seq_id, 0)
            raise EngineError(f"llama.cpp took {read} of {state.size} bytes of state of {chunk.num_tokens} tokens")

    def save(self, seq_id: int, tokens: range, buffer: npt.NDArray[np.uint8]) -> None:
        """See :meth:`Context.save`; all of the sequence is read for it."""
        self.saver(seq_id)(tokens, buffer)

    def saver(self, seq_id: int) -> Saver:
        """:meth:`save` for several parts: all of the sequence is read once, for the first of them."""
        return _Snapshot(self, seq_id).save

    def share(self, donor: int, seq_id: int, num_tokens: int) -> None:
        """Let ``seq_id`` hold a copy of the first ``num_tokens`` positions of ``donor``."""
        state = self.state(donor)
        self.inject(StateBlob(state, state.size, 0, num_tokens), seq_id)
        self.trim(seq_id, num_tokens)

    def state(self, seq_id: int) -> npt.NDArray[np.uint8]:
        """The sequence's state, uint8, as a unified cache would write it."""
        return out_of_streams(super().state(seq_id), self.streams, seq_id)


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
