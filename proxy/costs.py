"""What work takes: estimates learned from what it took, each with the sample behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from transfer.messages import Status

_NS_PER_S = 1_000_000_000
# Observations that are kept, and what each is worth in relation to the one after it.
WINDOW = 64
KEEP = 0.95
# One more term must lower the mean squared relative error by this much: 2% squared.
_TERM_PENALTY = 0.02**2
# Errors are relative, but not to less than this: nobody needs 1% of a microsecond.
_SMALL_NS = 100_000.0
# What took longer than predicted by more than this share counts less, the further off the less (Huber's weights): a
# hiccup is no trend. What takes less cannot be off by more than all of it.
_FAR = 0.5
# By what share work may take longer while the other engine is busy all the time: 0 on machines of their own, about 1
# where both compute on the same cores. A step up or down with each observation, if those that count differ by so much
# (standard deviation).
_CROWDING = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
_CONTRAST = 0.2
_AGES = KEEP ** np.arange(WINDOW - 1, -1, -1)


class Cost(msgspec.Struct, frozen=True, array_like=True):
    """Nanoseconds as a sum of terms: ``ns`` each times what its learner looks at. ``basis`` says how it is known.

    All of it takes longer by the share ``crowding`` while the other engine is busy: what they have in common.
    """

    ns: tuple[float, ...]
    samples: int
    basis: str = "learned"
    crowding: float = 0.0

    def at(self, *terms: float, crowd: float = 0.0) -> int:
        """What work of this size takes, in ns, if the other engine is busy for the share ``crowd`` of that time."""
        own_ns = sum(ns * term for ns, term in zip(self.ns, terms, strict=True))
        return round(own_ns * (1 + self.crowding * crowd))


class Learner:
    """A :class:`Cost` of ``num_terms`` terms from observations, by weighted least squares; no term is less than 0.

    The newest ``WINDOW`` observations count, each ``KEEP`` of the one after it. Errors are relative to what was
    predicted before, and those far off count less: iteratively reweighted least squares, a step with each observation.
    Of the sums that explain the past about equally well the one with the fewest terms is taken, and of those the one
    with the earlier terms: work that was seen in one size only is all due to the first term. Likewise of no crowding.
    """

    def __init__(self, num_terms: int) -> None:
        self._subsets = [terms for count in range(1, num_terms + 1) for terms in combinations(range(num_terms), count)]
        self._num_terms = num_terms
        self._seen: deque[tuple[float, ...]] = deque(maxlen=WINDOW)
        self._count = 0
        self._crowding = 0
        self.cost: Cost | None = None

    def observe(self, took_ns: int, *terms: float, crowd: float = 0.0) -> None:
        """Work of the size ``terms`` took ``took_ns``, the other engine being busy for the share ``crowd`` of it."""
        self._seen.append((*terms, crowd, took_ns))
        self._count += 1
        table = np.array(self._seen, np.float64)
        sizes, crowds, took = table[:, :-2], table[:, -2], table[:, -1]
        before = 1 + _CROWDING[self._crowding] * crowds
        scale = np.maximum(before * (sizes @ np.array(self.cost.ns)) if self.cost else took, _SMALL_NS)
        weights = _AGES[-len(took) :] * np.minimum(1, _FAR / np.maximum(took / scale - 1, _FAR))
        weights /= weights.sum() * scale**2
        best, best_error = [0.0] * self._num_terms, float("inf")
        for step in self._crowdings(crowds):
            crowded = sizes * (1 + _CROWDING[step] * crowds)[:, None]
            weighted = np.column_stack((crowded, took)) * weights[:, None]
            ns, error = self._fit((crowded.T @ weighted).tolist(), float(took @ weighted[:, -1]))
            error += _TERM_PENALTY * (step > 0)
            if error < best_error - 1e-9:
                best, best_error, self._crowding = ns, error, step
        crowding = _CROWDING[self._crowding]
        self.cost = Cost(tuple(float(f"{ns:.4g}") for ns in best), self._count, crowding=crowding)

    def start(self, observations: Iterable[tuple[int, Sequence[float]]]) -> None:
        """Begin with what was measured elsewhere: (ns, size). ``basis`` says so until something is observed here."""
        for took_ns, terms in observations:
            self.observe(took_ns, *terms)
        if self.cost:
            self.cost = msgspec.structs.replace(self.cost, basis="measured")

    def _crowdings(self, crowds: NDArray[np.float64]) -> Sequence[int]:
        """Indices to try; only the last one where observations that are all alike cannot tell."""
        ages = _AGES[-len(crowds) :]
        mean = np.average(crowds, weights=ages)
        if np.average((crowds - mean) ** 2, weights=ages) < _CONTRAST**2:
            return (self._crowding,)
        return range(max(0, self._crowding - 1), min(len(_CROWDING), self._crowding + 2))

    def _fit(self, products: list[list[float]], squares: float) -> tuple[list[float], float]:
        """Solve the normal equations, ``products`` with the right side in its last column, for the best subset.

        Returns it with its error.
        """
        best, best_error = [0.0] * self._num_terms, squares
        for terms in self._subsets:
            ns = _solved([[*(products[row][column] for column in terms), products[row][-1]] for row in terms])
            if ns is None or min(ns) < 0:
                continue
            explained = sum(value * products[row][-1] for value, row in zip(ns, terms, strict=True))
            error = squares - explained + _TERM_PENALTY * len(terms)
            if error < best_error - 1e-9:
                best_error = error
                best = [ns[terms.index(term)] if term in terms else 0.0 for term in range(self._num_terms)]
        return best, best_error


def _solved(rows: list[list[float]]) -> list[float] | None:
    """The solution of a symmetric, positive semidefinite system of a few equations; None if it is singular."""
    size = len(rows)
    scale = [rows[number][number] for number in range(size)]
    for pivot in range(size):
        if rows[pivot][pivot] <= 1e-9 * scale[pivot]:
            return None
        for lower in range(pivot + 1, size):
            factor = rows[lower][pivot] / rows[pivot][pivot]
            rows[lower] = [value - factor * above for value, above in zip(rows[lower], rows[pivot], strict=True)]
    found = [0.0] * size
    for row in reversed(range(size)):
        known = sum(rows[row][column] * found[column] for column in range(row + 1, size))
        found[row] = (rows[row][-1] - known) / rows[row][row]
    return found


class Average:
    """A mean that forgets: each new value counts for a tenth."""

    NEW = 0.1

    def __init__(self) -> None:
        self.value: float | None = None
        self.samples = 0

    def observe(self, value: float) -> None:
        """Take in ``value``."""
        self.samples += 1
        self.value = value if self.value is None else self.value + self.NEW * (value - self.value)


class Estimate(NamedTuple):
    """A duration and where the number comes from."""

    ns: int
    basis: str


def cpu_prefill(prompt_tokens: int, status: Status | None) -> Estimate | None:
    """How long the decode worker's own prefill would take; None until it has measured its speed."""
    if status is None or status.prefill_tokens_per_s <= 0:
        return None
    return Estimate(round(prompt_tokens / status.prefill_tokens_per_s * _NS_PER_S), status.prefill_basis)
