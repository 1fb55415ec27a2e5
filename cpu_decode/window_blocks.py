"""Blocks of KV that are copied as soon as they are full, because a sliding window leaves their cells to other tokens.

llama.cpp may give a cell to somebody else once the window has moved past it: of a long sequence the beginning is gone
when the request ends (``llama_kv_cache::find_slot``, ``is_masked_swa``). What it has not passed yet is whole. A block
is no longer than the window (``transfer/blocks.py``), so one that is copied before anything else gets cells is whole,
and so is the part of the next one that is there already. All copies together take no more than the cells do.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import structlog

from cpu_decode.llama import Context
from cpu_decode.prefix import Block
from cpu_decode.sequence import Sequence
from cpu_decode.state import ChunkState, StateBlob, state_bytes
from transfer import blocks
from transfer.errors import EngineError
from transfer.geometry import KVGeometry
from transfer.layout import CellType

log = structlog.get_logger()


class WindowBlocks:
    """Copies ``sequence.window_blocks`` of models that have windows; does nothing for others. Engine thread only."""

    def __init__(self, context: Context, geometry: KVGeometry, cell_type: CellType) -> None:
        self._context = context
        self._windowed = bool(geometry.sliding_window)
        self._block_tokens = blocks.tokens_per_block(geometry)
        self._block_bytes = state_bytes(geometry, self._block_tokens, cell_type)

    def follow(self, sequence: Sequence, injected: ChunkState | StateBlob | None = None) -> None:
        """Copy the blocks that have become full, the last of it by ``injected``; call it before others get cells."""
        if not self._windowed or sequence is not sequence.choices[0]:
            return
        copied = sequence.window_blocks
        while (start := len(copied) * self._block_tokens) + self._block_tokens <= sequence.num_cached:
            if isinstance(injected, StateBlob) and self._is_block(injected, start):
                copied.append(injected.buffer)
                continue
            buffer = np.empty(self._block_bytes, np.uint8)
            try:
                self._context.save(sequence.seq_id, range(start, start + self._block_tokens), buffer)
            except EngineError as error:
                log.warning("KV is not kept", request_id=sequence.request_id, reason=str(error))
                buffer = np.empty(0, np.uint8)
            copied.append(buffer)

    def copied(self, sequence: Sequence, block: Block) -> npt.NDArray[np.uint8] | None:
        """What :meth:`follow` has copied for ``block``, uint8, its ``num_bytes`` all; None if nothing."""
        at = block.start_token // self._block_tokens
        if at < len(sequence.window_blocks) and sequence.window_blocks[at].size == block.num_bytes:
            return sequence.window_blocks[at]
        return None

    def _is_block(self, blob: StateBlob, start_token: int) -> bool:
        """Whether ``blob`` came from a block that was kept, whole."""
        return (blob.start_token, blob.num_tokens, blob.buffer.size) == (
            start_token,
            self._block_tokens,
            self._block_bytes,
        )
