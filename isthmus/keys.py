"""``isthmus keys``: what to make, and what to say about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transfer import keys
from transfer.keys import SERVER

_MAY = {
    "decode": "identifies the decode workers",
    "prefill": "may send KV to them",
    "proxy": "may ask them for tokens",
}


def make(folder: Path, clients: tuple[str, ...]) -> Iterator[str]:
    """Make what ``folder`` lacks; yields what was made, and which host needs which files.

    Raises :class:`ConfigError` for a client name without a role and a folder that cannot be written.
    """
    made = keys.make(folder, clients)
    yield f"made {', '.join(made)} in {folder}" if made else f"{folder} has all of these keys already"
    names = [holder.name for holder in keys.holders(folder) if holder.name != SERVER]
    yield f"hosts of decode workers need {SERVER}.key_secret, {', '.join(f'{name}.key' for name in names)}"
    for name in names:
        yield f"the host of {name} needs {name}.key_secret, {SERVER}.key"
    yield "decode workers that run learn of a new client when they start again"


def describe(folder: Path) -> Iterator[str]:
    """A line for each public key in ``folder``; raises :class:`ConfigError` if one cannot be read."""
    for holder in keys.holders(folder):
        may = _MAY[holder.name.partition("-")[0]]
        yield f"{holder.public}  {holder.name}: {may}{'' if holder.has_secret else '; its secret is not here'}"
