"""Hosts as their powercap describes them: ``NAME.txt`` has ``== PATH`` lines, each followed by that file's content."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def unpack(host: str, folder: Path) -> Path:
    """Write ``host``'s zones under ``folder`` as /sys/class/powercap has them, and return it."""
    for part in (FOLDER / f"{host}.txt").read_text().split("== ")[1:]:
        path, _, content = part.partition("\n")
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return folder
