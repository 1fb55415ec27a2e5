"""KV that a stream of cells takes whole waits in RAM until all of it has come (``streams.py``)."""

from __future__ import annotations

from cpu_decode.sequence import Sequence
from cpu_decode.state import ChunkState, StateBlob
from cpu_decode.whole_state import Whole


class Gathering:
    """What has come of each sequence that is not in its stream yet. Engine thread only, but for ``num_bytes``."""

    def __init__(self, streams: int) -> None:
        self._streams = streams
        self._states: dict[Sequence, Whole] = {}
        self.num_bytes = 0

    def add(self, sequence: Sequence, piece: ChunkState | StateBlob) -> None:
        """Copy ``piece`` behind what has come before."""
        whole = self._states.get(sequence)
        if whole is None:
            whole = self._states[sequence] = Whole(piece, sequence.kv_tokens, self._streams)
            self.num_bytes += whole.num_bytes
        whole.add(piece)

    def take(self, sequence: Sequence) -> StateBlob | None:
        """All that has come, which waits no longer; None if nothing does."""
        whole = self._states.pop(sequence, None)
        if whole is None:
            return None
        self.num_bytes -= whole.num_bytes
        return whole.blob()

    def drop(self, sequence: Sequence) -> None:
        """Forget what has come: the request has ended."""
        self.take(sequence)
