"""States for caches that have a stream of cells for every sequence, and the way to them from those that have one."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cpu_decode.state import CELL, CELLS, HEAD, MAGIC, PLANE, SHAPE, ChunkState, StateBlob, cut

STREAMS = struct.Struct("<I")


def in_streams(chunk: ChunkState | StateBlob, streams: int) -> npt.NDArray[np.uint8]:
    """``chunk`` as a cache of so many streams takes it: one with the cells, and nothing in the others."""
    state = chunk.buffer[: chunk.num_bytes]
    if STREAMS.unpack_from(state.data, HEAD.size)[0] == streams:
        return state
    state = np.concatenate([state, np.zeros((streams - 1) * STREAMS.size, np.uint8)])
    STREAMS.pack_into(state.data, HEAD.size, streams)
    return state


def out_of_streams(state: npt.NDArray[np.uint8], streams: int, stream: int) -> npt.NDArray[np.uint8]:
    """``state``, in whose ``streams`` only ``stream`` has cells, as a cache of one stream writes it.

    It is the same memory.
    """
    before, behind = stream * STREAMS.size, (streams - 1 - stream) * STREAMS.size
    head = state[: HEAD.size].copy()
    single = state[before : state.size - behind]
    single[: HEAD.size] = head
    STREAMS.pack_into(single.data, HEAD.size, 1)
    return single


class Whole:
    """The state of the first tokens of a sequence, at most ``num_tokens``, for one of ``streams``; it comes in pieces.

    ``like`` is any piece: all have the same layers and types of rows. Models with sliding windows are not taken.
    """

    def __init__(self, like: ChunkState | StateBlob, num_tokens: int, streams: int) -> None:
        planes = list(_planes(like))
        row_bytes = sum(size_bytes for _, _, size_bytes in planes)
        self._size = HEAD.size + CELLS.size + num_tokens * (CELL.itemsize + row_bytes) + SHAPE.size
        self._size += len(planes) * PLANE.size
        self._streams = streams
        self._buffer = np.empty(self._size + (streams - 1) * STREAMS.size, np.uint8)
        self._buffer[self._size :] = 0
        self.num_tokens = 0
        at = HEAD.size + CELLS.size
        HEAD.pack_into(self._buffer.data, 0, MAGIC, 0)
        CELLS.pack_into(self._buffer.data, HEAD.size, streams, num_tokens)
        self._cells = self._buffer[at : at + num_tokens * CELL.itemsize].view(CELL)
        at += self._cells.nbytes
        SHAPE.pack_into(self._buffer.data, at, 0, len(planes) // 2)
        at += SHAPE.size
        self._rows: list[npt.NDArray[np.uint8]] = []
        for _, ggml_type, size_bytes in planes:
            PLANE.pack_into(self._buffer.data, at, ggml_type, size_bytes)
            at += PLANE.size
            self._rows.append(self._buffer[at : at + num_tokens * size_bytes].reshape(num_tokens, size_bytes))
            at += num_tokens * size_bytes

    @property
    def num_bytes(self) -> int:
        """Its size in memory."""
        return self._buffer.size

    def add(self, piece: ChunkState | StateBlob) -> None:
        """Copy the cells of ``piece`` behind those that are there; rows may be in any order."""
        rows = slice(self.num_tokens, self.num_tokens + piece.num_tokens)
        first = HEAD.size + CELLS.size
        cells = piece.buffer[first : first + piece.num_tokens * CELL.itemsize].view(CELL)
        self._cells[rows] = cells
        for out, (at, _, size_bytes) in zip(self._rows, _planes(piece), strict=True):
            end = at + piece.num_tokens * size_bytes
            out[rows] = piece.buffer[at:end].reshape(piece.num_tokens, size_bytes)
        self.num_tokens += piece.num_tokens

    def blob(self) -> StateBlob:
        """What has come."""
        if self.num_tokens < self._cells.size:
            return self._first_tokens()
        return StateBlob(self._buffer, self._buffer.size, 0, self.num_tokens)

    def _first_tokens(self) -> StateBlob:
        self._cells["position"][self.num_tokens :] = -1
        STREAMS.pack_into(self._buffer.data, HEAD.size, 1)
        return cut(StateBlob(self._buffer, self._size, 0, self.num_tokens), range(self.num_tokens))


def _planes(piece: ChunkState | StateBlob) -> Iterator[tuple[int, int, int]]:
    """Where the rows of each plane of a state of one cache begin, their type and the size of one."""
    at = HEAD.size + CELLS.size + piece.num_tokens * CELL.itemsize
    _, num_layers = SHAPE.unpack_from(piece.buffer.data, at)
    at += SHAPE.size
    for _ in range(2 * num_layers):
        ggml_type, size_bytes = PLANE.unpack_from(piece.buffer.data, at)
        at += PLANE.size
        yield at, ggml_type, size_bytes
        at += piece.num_tokens * size_bytes
