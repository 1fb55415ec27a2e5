"""Keeping the memory of received frames mapped between frames."""

from __future__ import annotations

import ctypes

import structlog

log = structlog.get_logger()

# mallopt(3) of glibc: parameters, and the largest threshold that it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MAX_MMAP_THRESHOLD_BYTES = 32 << 20


def keep_freed(kept_bytes: int) -> None:
    """Let this process's malloc keep up to ``kept_bytes`` of freed memory in each arena instead of unmapping it.

    ZeroMQ takes a frame's memory from malloc and gives it back a moment later. Left alone, glibc returns the pages to
    the kernel, and the next frame faults them in anew, zeroed: about a quarter of the receiver's CPU time. Blocks of
    over 32 MiB go back at once all the same. Does nothing where the C library has no mallopt (musl).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (
        mallopt(_MMAP_THRESHOLD, min(kept_bytes, _MAX_MMAP_THRESHOLD_BYTES)) and mallopt(_TRIM_THRESHOLD, kept_bytes)
    ):
        log.info("malloc cannot be told to keep freed memory; receiving takes more CPU time")
