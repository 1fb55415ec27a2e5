"""Frames become complete chunks: strict coverage, bounded memory, no copy but the codec's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpu_decode.state import ChunkState, state_bytes
from transfer import codecs
from transfer.errors import CapacityError, IsthmusError, ProtocolError
from transfer.frames import Header
from transfer.geometry import KVGeometry
from transfer.layout import CellType
from transfer.stages import SenderReport


class LandingPool:
    """Buffers of one chunk each, made on first use, kept for the next; never more than ``max_bytes`` together.

    Owned by the I/O thread. A ticket reserves its buffers up front, so a frame never finds the pool empty.
    """

    def __init__(self, geometry: KVGeometry, cell_type: CellType, chunk_tokens: int, max_bytes: int) -> None:
        self.buffer_bytes = state_bytes(geometry, chunk_tokens, cell_type)
        self._free: list[npt.NDArray[np.uint8]] = []
        self._unreserved = max_bytes // self.buffer_bytes
        self.in_use = 0

    def reserve(self, wanted: int) -> int:
        """Set aside up to ``wanted`` buffers, at least one; :class:`CapacityError` if there is none."""
        granted = min(wanted, self._unreserved)
        if granted < 1:
            raise CapacityError("no landing buffer is free; raise [decode] landing_mib or lower [link] chunk_tokens")
        self._unreserved -= granted
        return granted

    def unreserve(self, count: int) -> None:
        """Give a reservation back."""
        self._unreserved += count

    def take(self) -> npt.NDArray[np.uint8]:
        """A buffer of ``buffer_bytes`` bytes, contents arbitrary."""
        self.in_use += 1
        return self._free.pop() if self._free else np.empty(self.buffer_bytes, np.uint8)

    def give_back(self, buffer: npt.NDArray[np.uint8]) -> None:
        """Return a taken buffer."""
        self.in_use -= 1
        self._free.append(buffer)


class LandingReport(NamedTuple):
    """What a finished transfer cost: the sender's part and the receiver's."""

    sender: SenderReport
    wire_ns: int
    decode_frame_ns: int


class OpenChunk:
    """A chunk that is being filled, and the layer that is due in it."""

    def __init__(self, state: ChunkState) -> None:
        self.state = state
        self.tokens = range(state.start_token, state.start_token + state.num_tokens)
        self.next_layer = 0


class LandingPlace:
    """One ticket's sink: token ranges in order from ``start_token`` on, every layer of each, nothing twice or missing.

    Several chunks may be open at once, for the prefill node computes a layer for all tokens of a step before it comes
    to the next layer; an earlier chunk is never behind a later one.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        cell_type: CellType,
        codec: str,
        pool: LandingPool,
        *,
        num_tokens: int,
        start_token: int = 0,
        chunk_tokens: int,
        credit_chunks: int,
        on_chunk: Callable[[ChunkState], None],
        on_end: Callable[[LandingReport], None],
        on_fail: Callable[[IsthmusError], None],
    ) -> None:
        self._geometry = geometry
        self._cell_type = cell_type
        self._codec = codecs.by_name(codec)
        self._pool = pool
        self._num_tokens = num_tokens
        self._chunk_tokens = chunk_tokens
        self.credit_chunks = credit_chunks
        self._on_chunk, self._on_end, self._on_fail = on_chunk, on_end, on_fail
        self._next_token = start_token
        self._chunks = 0
        self._open: list[OpenChunk] = []
        self._first_frame_ns = 0
        self._decode_frame_ns = 0

    def data(self, header: Header, payload: memoryview) -> None:
        """Decode one frame into its place; raises :class:`ProtocolError` or :class:`CodecError`."""
        began = time.monotonic_ns()
        self._first_frame_ns = self._first_frame_ns or began
        chunk = self._due(header)
        planes = chunk.state.planes(header.first_layer, header.num_layers)
        self._codec.decode(payload, header.element, codecs.CELL_ELEMENT[self._cell_type], planes, chunk.tokens)
        chunk.next_layer += header.num_layers
        self._decode_frame_ns += time.monotonic_ns() - began
        if chunk.next_layer == self._geometry.num_layers:
            self._open.remove(chunk)
            self._on_chunk(chunk.state)

    def end(self, report: SenderReport) -> None:
        """Check that the prompt is covered and pass the report on."""
        if not self._next_token == report.num_tokens == self._num_tokens or self._open:
            landed = self._open[0].tokens.start if self._open else self._next_token
            raise ProtocolError(
                f"transfer ended with {landed} of {self._num_tokens} tokens landed, {report.num_tokens} sent"
            )
        wire_ns = time.monotonic_ns() - self._first_frame_ns
        self._on_end(LandingReport(report, wire_ns, self._decode_frame_ns))

    def fail(self, error: IsthmusError) -> None:
        """Give half-filled buffers back and pass the error on."""
        self.release()
        self._on_fail(error)

    def release(self) -> None:
        """Give half-filled buffers back."""
        for chunk in self._open:
            self._pool.give_back(chunk.state.buffer)
        self._open.clear()

    def _due(self, header: Header) -> OpenChunk:
        """The open chunk that ``header`` continues, or the one that it opens."""
        if header.codec != self._codec.wire_id:
            raise ProtocolError(f"frame uses codec {header.codec}, the ticket says {self._codec.wire_id}")
        tokens = range(header.start_token, header.start_token + header.num_tokens)
        at = next((at for at, chunk in enumerate(self._open) if chunk.tokens.start == tokens.start), len(self._open))
        known = self._open[at] if at < len(self._open) else None
        due = (known.tokens, known.next_layer) if known else (range(self._next_token, max(tokens.stop, 0)), 0)
        if (tokens, header.first_layer) != due:
            raise ProtocolError(f"frame has tokens {tokens} from layer {header.first_layer} where {due} was due")
        ahead = self._open[at - 1].next_layer if at else self._geometry.num_layers
        if not 1 <= header.num_layers <= ahead - header.first_layer:
            raise ProtocolError(
                f"frame of layers from {header.first_layer}, {header.num_layers} of them, is not due yet"
            )
        return known or self._open_chunk(tokens)

    def _open_chunk(self, tokens: range) -> OpenChunk:
        if not 1 <= len(tokens) <= min(self._chunk_tokens, self._num_tokens - tokens.start):
            raise ProtocolError(f"chunk of {len(tokens)} tokens from {tokens.start} does not fit its ticket")
        if self._chunks == self.credit_chunks:
            raise ProtocolError(f"chunk {self._chunks + 1} came without a credit")
        self._chunks += 1
        state = ChunkState(self._pool.take(), self._geometry, self._cell_type, tokens.start, len(tokens))
        self._next_token = tokens.stop
        self._open.append(OpenChunk(state))
        return self._open[-1]
