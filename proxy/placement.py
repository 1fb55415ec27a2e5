"""Which nodes of a kind a request prefers, and what is free at a worker."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple, Protocol

# Turns of one conversation begin alike, and so do requests with one system prompt.
AFFINITY_TOKENS = 64


class Named(Protocol):
    """A node that a request may go to."""

    @property
    def name(self) -> str:
        """By which it is known."""
        ...


class Candidate(NamedTuple):
    """A worker that takes requests. ``load`` is the share of its sequences that is taken."""

    name: str
    free_cells: int
    free_sequences: int
    load: float


def ranked(prompt: Sequence[int], candidates: Sequence[Named]) -> list[str]:
    """The nodes' names as a request prefers them, where they cost about the same.

    Prompts that begin alike prefer the nodes in the same order, which changes little when nodes come and go
    (rendezvous hashing, Thaler and Ravishankar 1996).
    """
    first = sorted(candidates, key=lambda candidate: _weight(prompt, candidate.name), reverse=True)
    return [candidate.name for candidate in first]


def _weight(prompt: Sequence[int], name: str) -> bytes:
    first = prompt[:AFFINITY_TOKENS]
    return blake2b(struct.pack(f"<{len(first)}q", *first) + name.encode(), digest_size=8).digest()
