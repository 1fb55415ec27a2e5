"""What work takes: estimates learned from what it took, each with the sample behind it."""

from __future__ import annotations

from collections import deque
from itertools import combinations
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from transfer.messages import Status

_NS_PER_S = 1_000_000_000
Floats = npt.NDArray[np.float64]
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
_PASSES = 2


class Cost(msgspec.Struct, frozen=True, array_like=True):
    """Nanoseconds as a sum of terms: ``ns`` each times what its learner looks at. ``basis`` says how it is known."""

    ns: tuple[float, ...]
    samples: int
    basis: str = "learned"

    def at(self, *terms: float) -> int:
        """What work of this size takes, in ns."""
        return round(sum(ns * term for ns, term in zip(self.ns, terms, strict=True)))


class Learner:
    """A :class:`Cost` of ``num_terms`` terms from observations, by weighted least squares; no term is less than 0.

    The newest ``WINDOW`` observations count, each ``KEEP`` of the one after it. Errors are relative to what is
    predicted, and those far off count less: iteratively reweighted least squares, a pass or two with each observation.
    Of the sums that explain the past about equally well the one with the fewest terms is taken, and of those the one
    with the earlier terms: work that was seen in one size only is all due to the first term.
    """

    def __init__(self, num_terms: int) -> None:
        self._subsets = [
            list(terms) for count in range(1, num_terms + 1) for terms in combinations(range(num_terms), count)
        ]
        self._none = np.zeros(num_terms)
        self._seen: deque[tuple[tuple[float, ...], int]] = deque(maxlen=WINDOW)
        self._count = 0
        self.cost: Cost | None = None

    def observe(self, took_ns: int, *terms: float) -> None:
        """Work of the size ``terms`` took ``took_ns``."""
        self._seen.append((terms, took_ns))
        self._count += 1
        sizes = np.array([terms for terms, _ in self._seen], np.float64)
        took = np.array([ns for _, ns in self._seen], np.float64)
        predicted = sizes @ np.array(self.cost.ns) if self.cost else took
        for _ in range(_PASSES):
            found = self._pass(sizes, took, predicted)
            predicted = sizes @ found
        self.cost = Cost(tuple(float(f"{ns:.4g}") for ns in found.tolist()), self._count)

    def _pass(self, sizes: Floats, took: Floats, predicted: Floats) -> Floats:
        scale = np.maximum(predicted, _SMALL_NS)
        off = took / scale - 1
        worth = KEEP ** np.arange(len(took) - 1, -1, -1) * np.minimum(1, _FAR / np.maximum(off, _FAR))
        worth /= worth.sum() * scale**2
        products, targets = sizes.T @ (sizes * worth[:, None]), sizes.T @ (took * worth)
        best, best_error = self._none, float((took**2 * worth).sum())
        for terms in self._subsets:
            try:
                ns = np.linalg.solve(products[np.ix_(terms, terms)], targets[terms])
            except np.linalg.LinAlgError:
                continue
            error = float(((sizes[:, terms] @ ns - took) ** 2 * worth).sum()) + _TERM_PENALTY * len(terms)
            if (ns >= 0).all() and error < best_error - 1e-9:
                best, best_error = self._none.copy(), error
                best[terms] = ns
        return best


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
