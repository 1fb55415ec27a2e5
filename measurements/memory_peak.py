"""The most resident memory that this process has had since a moment (proc(5): clear_refs, VmHWM)."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil


def restart() -> int:
    """Count the peak from now on; returns the resident bytes now. Where that is forbidden the peak is the old one."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most resident bytes since :func:`restart`."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))
