"""What a node works on for this proxy right now, as far as the next request has to wait for it."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np

# vLLM's own blocks are as long on a CPU, and divide this on a GPU.
BLOCK_TOKENS = 128
MAX_BLOCKS = 32_768


class Backlog:
    """Prefills that a node does one after the other: how long until it is done with those that were begun."""

    def __init__(self) -> None:
        self._open: set[object] = set()
        self._until_ns = 0

    @property
    def ns(self) -> int:
        """What is left of it."""
        return max(0, self._until_ns - time.monotonic_ns()) if self._open else 0

    def begin(self, expected_ns: int) -> object:
        """One more; returns what :meth:`end` wants."""
        left_ns = self.ns
        work = object()
        self._open.add(work)
        self._until_ns = time.monotonic_ns() + left_ns + expected_ns
        return work

    def end(self, work: object) -> None:
        """It is done, or was given up. Twice is as good as once."""
        self._open.discard(work)


class VllmLoad:
    """vLLM's backlog of prefills, what decodes there, and what lies in its prefix cache."""

    def __init__(self) -> None:
        self.backlog = Backlog()
        self.prefixes = RecentPrefixes()
        self.sequences = 0
        self.context_tokens = 0

    @contextmanager
    def decoding(self, sequences: int, context_tokens: int) -> Iterator[None]:
        """So many sequences decode in the body."""
        self.sequences += sequences
        self.context_tokens += context_tokens
        try:
            yield
        finally:
            self.sequences -= sequences
            self.context_tokens -= context_tokens


class RecentPrefixes:
    """Which prompts vLLM has computed lately, in blocks named by a chained hash: a guess at its prefix cache."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def add(self, prompt: Sequence[int], tenant: str) -> None:
        """It has computed ``prompt`` for ``tenant``."""
        for name in _names(prompt, tenant):
            self._blocks[name] = None
            self._blocks.move_to_end(name)
        while len(self._blocks) > MAX_BLOCKS:
            self._blocks.popitem(last=False)

    def held_tokens(self, prompt: Sequence[int], tenant: str) -> int:
        """How many of the prompt's first tokens it need not compute again, all but the last at most."""
        held = 0
        for name in _names(prompt, tenant):
            if name not in self._blocks:
                break
            held += BLOCK_TOKENS
        return min(held, len(prompt) - 1)


def _names(prompt: Sequence[int], tenant: str) -> Iterator[bytes]:
    tokens = np.asarray(prompt, np.int32)
    name = tenant.encode()
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        name = blake2b(name + tokens[start : start + BLOCK_TOKENS].tobytes(), digest_size=8).digest()
        yield name
