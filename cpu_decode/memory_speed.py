"""How fast this host's memory can be read, by a fraction of a second's trial."""

from __future__ import annotations

import threading
import time

import numpy as np

# Larger than the share of the last cache that the cores of a worker have, on most machines.
ARRAY_BYTES = 128 << 20
REPEATS = 4


def read_bytes_per_s(threads: int) -> float:
    """Bytes that ``threads`` threads read in a second, summing up one array together: the best of some passes.

    As STREAM (J. McCalpin) does it, but only reading, which is what decoding does to weights and KV.
    """
    parts = np.array_split(np.ones(ARRAY_BYTES // 8), threads)
    fastest_ns = min(_pass_ns(parts) for _ in range(REPEATS))
    return ARRAY_BYTES * 1e9 / fastest_ns


def _pass_ns(parts: list[np.ndarray[tuple[int], np.dtype[np.float64]]]) -> int:
    # numpy lets go of the interpreter's lock while it sums.
    readers = [threading.Thread(target=np.add.reduce, args=(part,)) for part in parts]
    began = time.monotonic_ns()
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return time.monotonic_ns() - began
