"""What a check found, and how files of the kernel are read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

Level = Literal["ok", "warn", "fail", "unknown"]


class Finding(NamedTuple):
    """One line of the report. ``why`` and ``fix`` are for people; a check that is ``ok`` has no fix.

    ``unknown`` is said where the host does not show what was looked for.
    """

    check: str
    level: Level
    seen: str
    why: str
    fix: str = ""


def text(path: Path) -> str | None:
    """The file without white space around it; None where it is missing or cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return None


def gibibytes(size_bytes: float) -> str:
    """For people."""
    return f"{size_bytes / 2**30:.1f} GiB"
