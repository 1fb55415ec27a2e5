"""What a node works on for this proxy right now, as far as the next request has to wait for it."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import NamedTuple, Self

import msgspec
import numpy as np

# vLLM's own blocks are as long on a CPU, and divide this on a GPU.
BLOCK_TOKENS = 128
MAX_BLOCKS = 32_768
# Of so many prompts it is known when they were done.
MAX_PREFILLS = 256


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


class Beside(msgspec.Struct, frozen=True, array_like=True):
    """What went on at a node during a stage of a request: on average, sequences that decoded there and the tokens that
    their steps looked at, the request's own among them; and ``prefilled_tokens`` of prompts, in the stage ``prefill``
    with its own. The other engine was busy for the share ``crowd`` of it.
    """

    sequences: float
    context_tokens: float
    prefilled_tokens: int
    crowd: float


class _Sums(NamedTuple):
    at_ns: int
    busy_ns: int = 0
    sequence_ns: int = 0
    context_ns: int = 0


class Occupancy:
    """What a node works on for this proxy, summed up over time."""

    def __init__(self) -> None:
        self._requests = self._sequences = self._context_tokens = 0
        self._sums = _Sums(time.monotonic_ns())
        self._busy_until_ns = 0
        self._prefilled: deque[tuple[int, int]] = deque(maxlen=MAX_PREFILLS)

    @property
    def idle_ns(self) -> int:
        """For how long nothing has been done there."""
        return 0 if self._requests else time.monotonic_ns() - self._busy_until_ns

    @contextmanager
    def working(self, sequences: int = 0, context_tokens: int = 0) -> Iterator[None]:
        """A request has it busy in the body, in which so many sequences decode."""
        self._change(1, sequences, context_tokens)
        try:
            yield
        finally:
            self._change(-1, -sequences, -context_tokens)

    def prefilled(self, tokens: int) -> None:
        """So many tokens of a prompt have been computed."""
        self._prefilled.append((time.monotonic_ns(), tokens))

    def prefilled_between(self, begin_ns: int, end_ns: int) -> int:
        """Tokens of prompts that were done then."""
        return sum(tokens for at_ns, tokens in self._prefilled if begin_ns < at_ns <= end_ns)

    def sums(self) -> _Sums:
        """All until now."""
        self._change(0, 0, 0)
        return self._sums

    def _change(self, requests: int, sequences: int, context_tokens: int) -> None:
        now_ns, sums = time.monotonic_ns(), self._sums
        took_ns = now_ns - sums.at_ns
        if self._requests:
            self._busy_until_ns = now_ns
        self._sums = _Sums(
            now_ns,
            sums.busy_ns + took_ns * (self._requests > 0),
            sums.sequence_ns + took_ns * self._sequences,
            sums.context_ns + took_ns * self._context_tokens,
        )
        self._requests += requests
        self._sequences += sequences
        self._context_tokens += context_tokens


class Watch:
    """``with Watch(own, other)``: a stage of a request at ``own``, and what the ``other`` engine did meanwhile."""

    def __init__(self, own: Occupancy, other: Occupancy) -> None:
        self._own, self._other = own, other

    def __enter__(self) -> Self:
        self._before, self._other_before = self._own.sums(), self._other.sums()
        return self

    def __exit__(self, *_: object) -> None:
        self._after, self._other_after = self._own.sums(), self._other.sums()

    @property
    def together_ns(self) -> int:
        """Prompts that are done by so much later were computed in the same steps."""
        return (self._after.at_ns - self._before.at_ns) // 10

    def beside(self, begin_later_ns: int, end_later_ns: int) -> Beside:
        """What went on; prompts count that were done in the stage, or so much later."""
        before, after = self._before, self._after
        took_ns = max(1, after.at_ns - before.at_ns)
        return Beside(
            round((after.sequence_ns - before.sequence_ns) / took_ns, 3),
            round((after.context_ns - before.context_ns) / took_ns, 1),
            self._own.prefilled_between(before.at_ns + begin_later_ns, after.at_ns + end_later_ns),
            round(min(1.0, (self._other_after.busy_ns - self._other_before.busy_ns) / took_ns), 3),
        )


class VllmLoad:
    """vLLM's backlog of prefills, what decodes there or will, and what lies in its prefix cache."""

    def __init__(self) -> None:
        self.backlog = Backlog()
        self.prefixes = RecentPrefixes()
        self.occupancy = Occupancy()
        self.sequences = 0
        self.context_tokens = 0

    @contextmanager
    def holding(self, sequences: int, context_tokens: int) -> Iterator[None]:
        """So many sequences are decoded there in the body, or will be."""
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
