"""The state of one sequence as caches take it that have a stream of cells for each.

Format: as in ``state.py``, but there are several streams, of which one has cells and the others, with 0 of them,
nothing more. Without flash attention V lies transposed: u32 1 in place of 0, and a plane of V is i32 type, u32 element
bytes, u32 elements of a row, and for each of these its values in all cells.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_decode.state import CELL, CELLS, HEAD, MAGIC, PLANE, SHAPE, ChunkState, StateBlob

_STREAMS = struct.Struct("<I")
_TRANSPOSED_PLANE = struct.Struct("<iII")
_ELEMENT_BYTES = 2


class Whole:
    """The state of the first tokens of a sequence, at most ``num_tokens``, for one of ``streams``; it comes in pieces.

    ``like`` is any piece: all have the same layers and types of rows. ``transposed`` V has elements of 16 bits. Models
    with sliding windows are not taken.
    """

    def __init__(self, like: ChunkState | StateBlob, num_tokens: int, streams: int, *, transposed: bool) -> None:
        planes = list(_planes(like.buffer))
        rows_at = HEAD.size + CELLS.size + num_tokens * CELL.itemsize + SHAPE.size
        size = rows_at + sum(PLANE.size + num_tokens * size_bytes for _, _, size_bytes in planes)
        self.buffer = np.empty(size + (streams - 1) * _STREAMS.size, np.uint8)
        self.buffer[size:] = 0
        self.num_tokens = 0
        HEAD.pack_into(self.buffer.data, 0, MAGIC, 0)
        CELLS.pack_into(self.buffer.data, HEAD.size, streams, num_tokens)
        self._cells = self.buffer[HEAD.size + CELLS.size : rows_at - SHAPE.size].view(CELL)
        SHAPE.pack_into(self.buffer.data, rows_at - SHAPE.size, transposed, len(planes) // 2)
        # Of each plane, ``[num_tokens, bytes of a row]``, or ``[num_tokens, elements of a row]``.
        self._rows: list[npt.NDArray[Any]] = []
        at = rows_at
        for index, (_, ggml_type, size_bytes) in enumerate(planes):
            rows = self.buffer[at + PLANE.size : at + PLANE.size + num_tokens * size_bytes]
            if transposed and index >= len(planes) // 2:
                elements = size_bytes // _ELEMENT_BYTES
                _TRANSPOSED_PLANE.pack_into(self.buffer.data, at, ggml_type, _ELEMENT_BYTES, elements)
                self._rows.append(rows.view(np.uint16).reshape(elements, num_tokens).T)
            else:
                PLANE.pack_into(self.buffer.data, at, ggml_type, size_bytes)
                self._rows.append(rows.reshape(num_tokens, size_bytes))
            at += PLANE.size + rows.size

    def add(self, piece: ChunkState | StateBlob) -> None:
        """Copy the cells of ``piece`` behind those that are there; rows may be in any order."""
        count = _num_cells(piece.buffer)
        tokens = slice(self.num_tokens, self.num_tokens + count)
        first = HEAD.size + CELLS.size
        self._cells[tokens] = piece.buffer[first : first + count * CELL.itemsize].view(CELL)
        for out, (at, _, size_bytes) in zip(self._rows, _planes(piece.buffer), strict=True):
            rows = piece.buffer[at : at + count * size_bytes].view(out.dtype)
            out[tokens] = rows.reshape(count, -1)
        self.num_tokens += count

    def finished(self, streams: int, *, transposed: bool) -> Whole:
        """One of no more tokens than have come."""
        if self.num_tokens == self._cells.size:
            return self
        like = StateBlob(self.buffer, 0, 0, 0)
        shorter = Whole(like, self.num_tokens, streams, transposed=transposed)
        shorter._cells[:] = self._cells[: self.num_tokens]
        for out, rows in zip(shorter._rows, self._rows, strict=True):
            out[:] = rows[: self.num_tokens]
        shorter.num_tokens = self.num_tokens
        return shorter


def out_of_streams(state: npt.NDArray[np.uint8], streams: int, stream: int) -> npt.NDArray[np.uint8]:
    """``state``, in whose ``streams`` only ``stream`` has cells, as a cache of one stream writes it.

    It is the same memory, unless V was transposed.
    """
    before, behind = stream * _STREAMS.size, (streams - 1 - stream) * _STREAMS.size
    head = state[: HEAD.size].copy()
    single = state[before : state.size - behind]
    single[: HEAD.size] = head
    _STREAMS.pack_into(single.data, HEAD.size, 1)
    at = HEAD.size + CELLS.size + _num_cells(single) * CELL.itemsize
    if at < single.size and SHAPE.unpack_from(single.data, at)[0]:
        return _in_rows(single, at)
    return single


def _in_rows(state: npt.NDArray[np.uint8], shape_at: int) -> npt.NDArray[np.uint8]:
    """``state`` with its V in rows of one cell each."""
    rows = state.copy()
    count = _num_cells(state)
    planes = list(_planes(state))
    SHAPE.pack_into(rows.data, shape_at, 0, len(planes) // 2)
    for at, ggml_type, size_bytes in planes[len(planes) // 2 :]:
        PLANE.pack_into(rows.data, at - PLANE.size, ggml_type, size_bytes)
        plane = slice(at, at + count * size_bytes)
        rows[plane].view(np.uint16).reshape(count, -1)[:] = state[plane].view(np.uint16).reshape(-1, count).T
    return rows


def _num_cells(state: npt.NDArray[np.uint8]) -> int:
    return int(CELLS.unpack_from(state.data, HEAD.size)[1])


def _planes(state: npt.NDArray[np.uint8]) -> Iterator[tuple[int, int, int]]:
    """Where the values of each plane of the first stream's only cache begin, their type and bytes a cell."""
    count = _num_cells(state)
    at = HEAD.size + CELLS.size + count * CELL.itemsize
    transposed, num_layers = SHAPE.unpack_from(state.data, at)
    at += SHAPE.size
    for index in range(2 * num_layers):
        if transposed and index >= num_layers:
            ggml_type, element_bytes, elements = _TRANSPOSED_PLANE.unpack_from(state.data, at)
            size_bytes = element_bytes * elements
        else:
            ggml_type, size_bytes = PLANE.unpack_from(state.data, at)
        at += PLANE.size
        yield at, ggml_type, size_bytes
        at += count * size_bytes
