"""Frames become complete chunks: strict coverage, bounded memory, no copy but the codec's own."""

from __future__ import annotations

import math
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
from transfer.layout import CellType, Elements, plane_elements
from transfer.shares import Share, whole
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

    def set_aside(self, num_bytes: int) -> int:
        """Reserve for memory of another shape; returns how many buffers' worth that is.

        Raises :class:`CapacityError` if it cannot be had.
        """
        count = math.ceil(num_bytes / self.buffer_bytes)
        if count > self._unreserved:
            raise CapacityError("no landing memory is free for a whole prompt; raise [decode] landing_mib")
        self._unreserved -= count
        return count

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
    """What a finished transfer cost: the sender's part and the receiver's. The last data came at ``last_data_ns``."""

    sender: SenderReport
    wire_ns: int
    last_data_ns: int
    decode_frame_ns: int


class OpenChunk:
    """A chunk that is being filled; ``missing`` counts pairs of a head and a layer."""

    def __init__(self, state: ChunkState, geometry: KVGeometry) -> None:
        self.state = state
        self.tokens = range(state.start_token, state.start_token + state.num_tokens)
        self.missing = whole(geometry).size


class Filling:
    """A chunk that one source has begun, and the layer that is due in it."""

    def __init__(self, chunk: OpenChunk, next_layer: int) -> None:
        self.chunk = chunk
        self.next_layer = next_layer


class Progress:
    """How far the source of one share is: the token after its last chunk, and the chunks that it has not finished."""

    def __init__(self, share: Share, next_token: int) -> None:
        self.share = share
        self.next_token = next_token
        self.chunks = 0
        self.filling: list[Filling] = []


class LandingPlace:
    """One ticket's sink: token ranges in order from ``start_token`` on, every layer of each, nothing twice or missing.

    Several chunks may be open at once, for the prefill node computes a layer for all tokens of a step before it comes
    to the next layer; an earlier chunk is never behind a later one. Where several ranks send a share each, all cut the
    prompt alike, and a chunk is complete when each has filled its heads and layers.
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
        self._start_token = start_token
        self._progress: dict[Share, Progress] = {}
        self._open: dict[int, OpenChunk] = {}
        self._first_frame_ns = self._last_data_ns = 0
        self._decode_frame_ns = 0

    def data(self, header: Header, payload: memoryview, share: Share, received_ns: int) -> None:
        """Decode one frame into its place; raises :class:`ProtocolError` or :class:`CodecError`."""
        self._last_data_ns = received_ns
        began = time.monotonic_ns()
        self._first_frame_ns = self._first_frame_ns or began
        progress = self._progress.setdefault(share, Progress(share, self._start_token))
        codec = self._codec.of_frame(plane_elements(share.geometry(self._geometry), header.num_tokens))
        if header.codec != codec.wire_id:
            raise ProtocolError(f"frame uses codec {header.codec} where {codec.wire_id} was due")
        filling = self._due(progress, header)
        chunk = filling.chunk
        self._decode(codec, header, payload, chunk, share)
        filling.next_layer += header.num_layers
        if filling.next_layer == share.layers.stop:
            progress.filling.remove(filling)
        chunk.missing -= header.num_layers * share.num_kv_heads
        self._decode_frame_ns += time.monotonic_ns() - began
        if not chunk.missing:
            del self._open[chunk.tokens.start]
            self._on_chunk(chunk.state)

    def end(self, report: SenderReport) -> None:
        """Check that the prompt is covered and pass the report on."""
        ends = {progress.next_token for progress in self._progress.values()}
        if self._open or ends != {self._num_tokens} or report.num_tokens != self._num_tokens:
            landed = min([*self._open, *ends], default=self._start_token)
            raise ProtocolError(
                f"transfer ended with {landed} of {self._num_tokens} tokens landed, {report.num_tokens} sent"
            )
        wire_ns = time.monotonic_ns() - self._first_frame_ns
        self._on_end(LandingReport(report, wire_ns, self._last_data_ns, self._decode_frame_ns))

    def fail(self, error: IsthmusError) -> None:
        """Give half-filled buffers back and pass the error on."""
        self.release()
        self._on_fail(error)

    def release(self) -> None:
        """Give half-filled buffers back."""
        for chunk in self._open.values():
            self._pool.give_back(chunk.state.buffer)
        self._open.clear()
        for progress in self._progress.values():
            progress.filling.clear()

    def _decode(self, codec: codecs.Codec, header: Header, payload: memoryview, chunk: OpenChunk, share: Share) -> None:
        """Write a frame's heads into the rows of its layers."""
        planes = chunk.state.planes(header.first_layer, header.num_layers)
        element = codecs.CELL_ELEMENT[self._cell_type]
        all_heads = self._geometry.num_kv_heads
        if share.num_kv_heads == all_heads:
            codec.decode(payload, header.element, element, planes, chunk.tokens)
            return
        places = [_heads(plane, len(chunk.tokens), all_heads, share.kv_heads) for plane in planes]
        # Codecs write whole planes, and rows of some heads are not contiguous.
        decoded = [np.empty(place.size, np.uint16) for place in places]
        codec.decode(payload, header.element, element, decoded, chunk.tokens)
        for place, rows in zip(places, decoded, strict=True):
            place[:] = rows.reshape(place.shape)

    def _due(self, progress: Progress, header: Header) -> Filling:
        """What ``header`` continues, or begins."""
        tokens = range(header.start_token, header.start_token + header.num_tokens)
        begun, layers = progress.filling, progress.share.layers
        at = next((at for at, each in enumerate(begun) if each.chunk.tokens.start == tokens.start), len(begun))
        known = begun[at] if at < len(begun) else None
        due = (
            (known.chunk.tokens, known.next_layer)
            if known
            else (range(progress.next_token, max(tokens.stop, 0)), layers.start)
        )
        if (tokens, header.first_layer) != due:
            raise ProtocolError(f"frame has tokens {tokens} from layer {header.first_layer} where {due} was due")
        ahead = begun[at - 1].next_layer if at else layers.stop
        if not 1 <= header.num_layers <= ahead - header.first_layer:
            raise ProtocolError(
                f"frame of layers from {header.first_layer}, {header.num_layers} of them, is not due yet"
            )
        return known or self._begin(progress, tokens)

    def _begin(self, progress: Progress, tokens: range) -> Filling:
        if not 1 <= len(tokens) <= min(self._chunk_tokens, self._num_tokens - tokens.start):
            raise ProtocolError(f"chunk of {len(tokens)} tokens from {tokens.start} does not fit its ticket")
        if progress.chunks == self.credit_chunks:
            raise ProtocolError(f"chunk {progress.chunks + 1} came without a credit")
        chunk = self._open.get(tokens.start) or self._open_chunk(tokens)
        if chunk.tokens != tokens:
            raise ProtocolError(f"chunk of {tokens} comes as {chunk.tokens} from another rank")
        progress.chunks += 1
        progress.next_token = tokens.stop
        progress.filling.append(Filling(chunk, progress.share.first_layer))
        return progress.filling[-1]

    def _open_chunk(self, tokens: range) -> OpenChunk:
        state = ChunkState(self._pool.take(), self._geometry, self._cell_type, tokens.start, len(tokens))
        chunk = self._open[tokens.start] = OpenChunk(state, self._geometry)
        return chunk


def _heads(plane: Elements, num_tokens: int, all_heads: int, heads: range) -> Elements:
    """``heads`` in the rows of a plane: a view, ``[num_tokens, heads, of one head]``."""
    return plane.reshape(num_tokens, all_heads, -1)[:, heads.start : heads.stop]
