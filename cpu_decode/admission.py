"""Who may come in: cells, sequence ids and landing buffers are promised before any work is done."""

from __future__ import annotations

from transfer.errors import CapacityError, RequestError


class Admission:
    """Counts cells and hands out sequence ids; owned by the I/O thread."""

    def __init__(self, num_cells: int, max_sequences: int) -> None:
        self.num_cells = num_cells
        self.max_sequences = max_sequences
        self._free_ids = list(reversed(range(max_sequences)))
        self._cells_by_id: dict[int, int] = {}

    @property
    def used_cells(self) -> int:
        """Cells promised to admitted requests."""
        return sum(self._cells_by_id.values())

    @property
    def admitted(self) -> int:
        """Admitted requests."""
        return len(self._cells_by_id)

    def admit(self, num_tokens: int) -> int:
        """Promise ``num_tokens`` cells and return a sequence id.

        Raises :class:`RequestError` if the cells could never suffice, :class:`CapacityError` if they do not now.
        """
        if num_tokens > self.num_cells:
            raise RequestError(
                f"prompt and max_tokens need {num_tokens} cells, the decode worker has {self.num_cells}", "max_tokens"
            )
        if not self._free_ids:
            raise CapacityError(f"all {self.max_sequences} sequences of the decode worker are taken")
        free = self.num_cells - self.used_cells
        if num_tokens > free:
            raise CapacityError(f"prompt and max_tokens need {num_tokens} cells, {free} are free")
        seq_id = self._free_ids.pop()
        self._cells_by_id[seq_id] = num_tokens
        return seq_id

    def release(self, seq_id: int) -> None:
        """Take a promise back."""
        del self._cells_by_id[seq_id]
        self._free_ids.append(seq_id)
