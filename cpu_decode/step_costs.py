"""What a step costs that computes more rows than it has sequences, over the step that has one row for each."""

from __future__ import annotations

from collections.abc import Mapping

# Share of the newest sample in a running mean.
WEIGHT = 0.2
# How far what was seen may pull the cost from what was measured before: one odd step must not.
LEAST_BIAS, MOST_BIAS = 0.5, 4.0


class StepCosts:
    """Interpolates ``row_ns``, the duration of a batch by its number of rows, and learns from every step after that.

    Engine thread only. Without ``row_ns`` nothing is known, and every cost is infinite.
    """

    def __init__(self, row_ns: Mapping[int, float]) -> None:
        self._rows = sorted(row_ns)
        self._ns = [row_ns[rows] for rows in self._rows]
        self._plain_ns: dict[int, float] = {}
        # What steps really took over what was expected, by their number of sequences: long contexts make rows dearer.
        self._bias: dict[int, float] = {}

    @property
    def most_rows(self) -> int:
        """Nothing is known of larger batches."""
        return self._rows[-1] if self._rows else 0

    def ratio(self, sequences: int, rows: int, more_ns: float = 0.0) -> float:
        """Duration of a step of ``rows`` rows, and ``more_ns`` beside it, over one of ``sequences`` rows."""
        if rows == sequences and not more_ns:
            return 1.0
        if not self._rows or rows > self.most_rows:
            return float("inf")
        plain_ns = self._interpolated_ns(sequences)
        expected = self._bias.get(sequences, 1.0) * self._interpolated_ns(rows) / plain_ns
        return max(expected, 1.0) + more_ns / self._plain_ns.get(sequences, plain_ns)

    def observe(self, sequences: int, rows: int, step_ns: int) -> None:
        """Note how long a step took."""
        plain_ns = self._plain_ns.get(sequences)
        if rows == sequences:
            self._plain_ns[sequences] = plain_ns + WEIGHT * (step_ns - plain_ns) if plain_ns else step_ns
        elif plain_ns and self._rows and rows <= self.most_rows:
            expected = self._interpolated_ns(rows) / self._interpolated_ns(sequences)
            seen = min(max(step_ns / plain_ns / expected, LEAST_BIAS), MOST_BIAS)
            bias = self._bias.get(sequences, 1.0)
            self._bias[sequences] = bias + WEIGHT * (seen - bias)

    def _interpolated_ns(self, rows: int) -> float:
        """Between two measured numbers of rows the larger one's, for costs jump: kernels take rows in groups."""
        return next((ns for known, ns in zip(self._rows, self._ns, strict=True) if known >= rows), self._ns[-1])
