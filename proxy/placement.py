"""Which decode worker a request goes to: a pure decision, so that it can be replayed."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

# Turns of one conversation begin alike, and so do requests with one system prompt.
AFFINITY_TOKENS = 64
# So much more of its sequences than the least loaded worker's may be taken on the preferred one.
MAX_EXTRA_LOAD = 0.25


class Candidate(NamedTuple):
    """A worker that takes requests. ``load`` is the share of its sequences that is taken."""

    name: str
    free_cells: int
    free_sequences: int
    load: float


def place(prompt: Sequence[int], cells: int, sequences: int, candidates: Sequence[Candidate]) -> str:
    """The name of the worker for a request that needs ``cells`` and ``sequences``; ``candidates`` are not empty.

    Prompts that begin alike prefer the workers in the same order, which changes little when workers come and go
    (rendezvous hashing, Thaler and Ravishankar 1996). The first one that has room and is not much more loaded than the
    least loaded gets the request; where none has room, the same among all.
    """
    ranked = sorted(candidates, key=lambda candidate: _weight(prompt, candidate.name), reverse=True)
    roomy = [each for each in ranked if each.free_cells >= cells and each.free_sequences >= sequences] or ranked
    most_load = min(each.load for each in roomy) + MAX_EXTRA_LOAD
    return next(each.name for each in roomy if each.load <= most_load)


def _weight(prompt: Sequence[int], name: str) -> bytes:
    first = prompt[:AFFINITY_TOKENS]
    return blake2b(struct.pack(f"<{len(first)}q", *first) + name.encode(), digest_size=8).digest()
