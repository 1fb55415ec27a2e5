"""Sequences that have lost their cells: their KV waits in RAM, with everything else that they are, for cells.

Where answers may outgrow the cells that were promised for them (``[decode] promised_share``), the newest sequence
makes room for the others and comes back when there is room: nothing is computed twice, and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from cpu_decode.llama import Context
from cpu_decode.sequence import Sequence as Decoding
from cpu_decode.state import StateBlob
from transfer.errors import EngineError

# A sequence comes back only where each that runs then can go on for so many steps: coming and going costs time.
STEPS_AHEAD = 64


class Parked:
    """The preempted sequences and their KV. Engine thread only."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._blobs: dict[Decoding, StateBlob] = {}

    def __len__(self) -> int:
        return len(self._blobs)

    def __contains__(self, sequence: Decoding) -> bool:
        return sequence in self._blobs

    def park(self, sequence: Decoding) -> None:
        """Copy the KV of ``sequence`` to RAM and free its cells."""
        state = self._context.state(sequence.seq_id)
        self._blobs[sequence] = StateBlob(state, state.size, 0, sequence.num_cached)
        self._context.trim(sequence.seq_id, 0)
        sequence.num_cached = 0
        sequence.preemptions += 1

    def blob(self, seq_id: int) -> StateBlob | None:
        """What ``seq_id`` had in cells, if it is parked."""
        return next((blob for sequence, blob in self._blobs.items() if sequence.seq_id == seq_id), None)

    def next(self, resident: Sequence[Decoding], running: int, num_cells: int) -> Decoding | None:
        """The oldest, if there is room for it beside the sequences that have cells, or are to have them soon.

        Cells that ``resident`` ones share count for each: the guess is on the safe side, and where nobody else is left
        there is always room.
        """
        waiting = [sequence for sequence in self._blobs if not sequence.ended]
        sequence = min(waiting, key=lambda each: each.admitted_ns, default=None)
        if sequence is None:
            return None
        taken = sum(max(each.num_cached, each.prompt_tokens) for each in resident)
        ahead = min(STEPS_AHEAD, sequence.left_tokens) * (running + 1)
        room = num_cells - taken - self._blobs[sequence].num_tokens
        return sequence if not resident or room >= ahead else None

    def bring_back(self, sequence: Decoding) -> bool:
        """Copy its KV into cells again; False if there are too few, and it stays parked."""
        blob = self._blobs[sequence]
        try:
            if blob.num_tokens:
                self._context.inject(blob, sequence.seq_id)
        except EngineError:
            return False
        del self._blobs[sequence]
        sequence.num_cached = blob.num_tokens
        return True

    def drop(self, sequence: Decoding) -> None:
        """Forget its KV, if it is parked: the request has ended."""
        self._blobs.pop(sequence, None)
