"""Who may come in: cells, sequence ids and landing buffers are promised before any work is done."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

from transfer.config import Decode
from transfer.errors import CapacityError, RequestError

# llama.cpp makes streams of multiples of this.
STREAM_STEP_CELLS = 256


def allocated_cells(decode: Decode) -> int:
    """Cells that a worker has: in streams those that were asked for, and what llama.cpp rounds up."""
    if decode.cell_layout == "unified":
        return decode.num_cells
    asked = max(1, decode.num_cells // decode.max_sequences)
    return decode.max_sequences * math.ceil(asked / STREAM_STEP_CELLS) * STREAM_STEP_CELLS


class Span:
    """Consecutive cells of the same ``holders`` sequences."""

    def __init__(self, num_cells: int, holders: int) -> None:
        self.num_cells = num_cells
        self.holders = holders


class Admission:
    """Counts cells and hands out sequence ids; owned by the I/O thread.

    Sequences may share the cells of a common prefix; those are free when the last of them has gone. One sequence may
    have ``sequence_cells``, or all of them.
    """

    def __init__(self, num_cells: int, max_sequences: int, sequence_cells: int | None = None) -> None:
        self.num_cells = num_cells
        self.sequence_cells = sequence_cells or num_cells
        self.max_sequences = max_sequences
        self.used_cells = 0
        # The lowest first: where sequences have streams, gaps between those that run cost time.
        self._free_ids = list(range(max_sequences))
        # What each sequence was promised, in the order of its positions.
        self._spans_by_id: dict[int, list[Span]] = {}

    @property
    def admitted(self) -> int:
        """Admitted requests."""
        return len(self._spans_by_id)

    @property
    def free_cells(self) -> int:
        """Cells that are promised to nobody."""
        return self.num_cells - self.used_cells

    @property
    def free_sequences(self) -> int:
        """Sequence ids that are promised to nobody."""
        return len(self._free_ids)

    def cells(self, seq_ids: Iterable[int]) -> int:
        """Cells that would be free without ``seq_ids``; ones that they share with each other do not count."""
        spans = (span for seq_id in seq_ids for span in self._spans_by_id[seq_id])
        return sum(span.num_cells for span in spans if span.holders == 1)

    def admit(self, num_tokens: int, donor: int | None = None, shared_tokens: int = 0) -> int:
        """Promise ``num_tokens`` cells, of which the first ``shared_tokens`` are ``donor``'s; returns a sequence id.

        Raises :class:`RequestError` if the cells could never suffice, :class:`CapacityError` if they do not now.
        """
        self.require(num_tokens)
        if not self._free_ids:
            raise CapacityError(f"all {self.max_sequences} sequences of the decode worker are taken")
        needed = num_tokens - shared_tokens
        if needed > self.free_cells:
            raise CapacityError(f"prompt and max_tokens need {needed} cells, {self.free_cells} are free")
        seq_id = heapq.heappop(self._free_ids)
        shared = self._first_spans(donor, shared_tokens) if donor is not None else []
        for span in shared:
            span.holders += 1
        self._spans_by_id[seq_id] = [*shared, Span(needed, holders=1)]
        self.used_cells += needed
        return seq_id

    def require(self, num_tokens: int) -> None:
        """Raise :class:`RequestError` if a sequence of ``num_tokens`` cells could never be had."""
        if num_tokens > self.sequence_cells:
            where = ""
            if self.sequence_cells < self.num_cells:
                where = (
                    f" for each of its {self.max_sequences} sequences; in [decode] raise num_cells, lower"
                    " max_sequences, or set cell_layout to unified"
                )
            raise RequestError(
                f"prompt and max_tokens need {num_tokens} cells, the decode worker has {self.sequence_cells}{where}",
                "max_tokens",
            )

    def release(self, seq_id: int) -> None:
        """Take a promise back."""
        for span in self._spans_by_id.pop(seq_id):
            span.holders -= 1
            self.used_cells -= 0 if span.holders else span.num_cells
        heapq.heappush(self._free_ids, seq_id)

    def _first_spans(self, seq_id: int, num_cells: int) -> list[Span]:
        """The spans of the first ``num_cells`` cells of ``seq_id``; one is cut in two where they end inside it."""
        first = []
        for span in self._spans_by_id[seq_id]:
            if num_cells == 0:
                break
            if num_cells < span.num_cells:
                self._cut(span, num_cells)
            first.append(span)
            num_cells -= span.num_cells
        return first

    def _cut(self, span: Span, num_cells: int) -> None:
        rest = Span(span.num_cells - num_cells, span.holders)
        span.num_cells = num_cells
        for spans in self._spans_by_id.values():
            if span in spans:
                spans.insert(spans.index(span) + 1, rest)
