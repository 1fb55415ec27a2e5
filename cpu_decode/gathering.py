"""KV that a stream of cells takes whole waits in RAM until all of it has come (``streams.py``)."""

from __future__ import annotations

from cpu_decode.sequence import Sequence
from cpu_decode.state import ChunkState, StateBlob
from cpu_decode.streams import StreamContext
from cpu_decode.whole_state import Whole


class Gathering:
    """What has come of each sequence that is not in its stream yet. Engine thread only, but for ``num_bytes``."""

    def __init__(self, context: StreamContext) -> None:
        self._context = context
        self._states: dict[Sequence, Whole] = {}
        self.num_bytes = 0

    def add(self, sequence: Sequence, piece: ChunkState | StateBlob) -> None:
        """Copy ``piece`` behind what has come before."""
        whole = self._states.get(sequence)
        if whole is None:
            whole = self._states[sequence] = self._context.whole(piece, sequence.kv_tokens)
            self.num_bytes += whole.buffer.size
        whole.add(piece)

    def settle(self, sequence: Sequence) -> bool:
        """Put what has come into the sequence's stream; False if nothing has. Raises :class:`EngineError`."""
        whole = self.drop(sequence)
        if whole is None:
            return False
        self._context.put(whole, sequence.seq_id)
        return True

    def drop(self, sequence: Sequence) -> Whole | None:
        """What has come, which waits no longer; None if nothing does."""
        whole = self._states.pop(sequence, None)
        if whole is not None:
            self.num_bytes -= whole.buffer.size
        return whole
