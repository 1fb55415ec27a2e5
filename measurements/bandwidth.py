"""What this host's memory can give: STREAM's triad, and plain reading, which is what decoding does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Larger than any cache that a laptop or a server of one or two sockets has a share of.
ARRAY_BYTES = 256 << 20
REPEATS = 5


@numba.njit(nogil=True, fastmath=True)  # type: ignore[untyped-decorator]
def _triad(a: Floats, b: Floats, c: Floats) -> None:
    for i in range(a.size):
        a[i] = b[i] + 3.0 * c[i]


@numba.njit(nogil=True, fastmath=True)  # type: ignore[untyped-decorator]
def _sum(a: Floats) -> float:
    total = 0.0
    for i in range(a.size):
        total += a[i]
    return total


def triad_gb_per_s(threads: int) -> float:
    """Bytes that STREAM counts for ``a = b + s c`` (three arrays), best of some passes (J. McCalpin, STREAM)."""
    count = ARRAY_BYTES // 8
    a, b, c = (np.full(count, float(value)) for value in range(3))
    return 3 * ARRAY_BYTES / _best_ns(lambda part: _triad(a[part], b[part], c[part]), count, threads)


def read_gb_per_s(threads: int) -> float:
    """Bytes that a sum over an array reads, best of some passes."""
    count = ARRAY_BYTES // 8
    a = np.ones(count)
    return ARRAY_BYTES / _best_ns(lambda part: _sum(a[part]), count, threads)


def _best_ns(work: Callable[[slice], Any], count: int, threads: int) -> int:
    """The shortest time in which ``threads`` threads did ``work`` on a slice of ``count`` each."""
    parts = [slice(count * k // threads, count * (k + 1) // threads) for k in range(threads)]
    times = []
    # The first pass compiles.
    for _ in range(REPEATS + 1):
        workers = [threading.Thread(target=work, args=(part,)) for part in parts]
        began = time.monotonic_ns()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        times.append(time.monotonic_ns() - began)
    return min(times[1:])
