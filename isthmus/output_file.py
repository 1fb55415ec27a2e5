"""A file that a command writes when all its work is done: whether it can be written is looked at before."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import click


class OutputFile(click.Path):
    """A path, whose folders need not exist yet; with ``suffixes``, such as ``.png``, its name must end in one of them.

    One that cannot be written is a usage error. Nothing stays that is made here.
    """

    def __init__(self, *suffixes: str) -> None:
        super().__init__(dir_okay=False, readable=False, writable=True, path_type=Path)
        self._suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """``value`` as a :class:`~pathlib.Path`."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if self._suffixes and path.suffix.lower() not in self._suffixes:
            self.fail(f"{str(path)!r} does not end in {' or '.join(self._suffixes)}.", param, ctx)
        if path.exists():
            return path
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        try:
            # Permissions are not all that may be in the way.
            TemporaryFile(dir=folder).close()
        except OSError as error:
            self.fail(f"nothing can be written to {str(folder)!r}: {error.strerror}.", param, ctx)
        return path
