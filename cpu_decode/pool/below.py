"""The tiers below RAM together: blocks go there behind the worker's back, and come back on a thread of their own.

Writing and reading never happen on the threads that serve. What does not fit into a queue is not written, or not
fetched: that costs time later, and nothing else.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import structlog

from cpu_decode.pool.losses import Losses
from cpu_decode.pool.stored import Payload, StoredBlock
from transfer.messages import TierStatus

log = structlog.get_logger()

MAX_FETCHES = 64
# So many blocks are read between two looks at the clock.
BLOCKS_PER_LOOK = 8
# How long writers may take to empty their queues at the end.
CLOSE_S = 5.0
# A rate that is older is doubted: the next read measures it again.
RATE_S = 60.0
_SMOOTHING = 0.5


class Tier(Protocol):
    """Where blocks lie below RAM. Thread-safe."""

    name: str
    losses: Losses
    corrupt_blocks: int

    @property
    def used_bytes(self) -> int:
        """What its blocks take."""

    @property
    def capacity_bytes(self) -> int:
        """What they may take; 0 where it is not known, or nothing is written."""

    def __len__(self) -> int:
        """Blocks."""

    def load(self) -> None:
        """Find out what is there."""

    def close(self) -> None:
        """Let go of it."""

    def holds(self, name: bytes) -> bool:
        """Whether the block ``name`` need not be put there."""

    def may_hold(self, name: bytes) -> bool:
        """Whether :meth:`get` might find it."""

    def get(self, names: Sequence[bytes]) -> list[Payload]:
        """The first of ``names``, as far as they are all there and intact."""

    def put(self, block: StoredBlock) -> None:
        """Take ``block``, or leave it."""


class Fetch(NamedTuple):
    """Blocks that follow each other, wanted for a request until ``deadline_ns``.

    ``chains`` are their names by fidelity, the better one first; ``tiers`` where to look.
    """

    request_id: str
    chains: tuple[tuple[str, list[bytes]], ...]
    tiers: tuple[str, ...]
    deadline_ns: int


class Piece(NamedTuple):
    """A block that was fetched."""

    payload: Payload
    fidelity: str
    tier: str


class Fetched(NamedTuple):
    """The first blocks that a :class:`Fetch` was for, perhaps none, and how long it took with its wait."""

    request_id: str
    pieces: list[Piece]
    took_ns: int


class LowerTiers:
    """``tiers``, the fastest first; at most ``max_behind_bytes`` wait to be written to each."""

    def __init__(self, tiers: Sequence[Tier] = (), max_behind_bytes: int = 1 << 28) -> None:
        self.tiers = tuple(tiers)
        self._writers = [_Writer(tier, max_behind_bytes) for tier in self.tiers]
        self._rates = {tier.name: ReadRate() for tier in self.tiers}
        self._jobs: deque[tuple[Fetch, int]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._emit: Callable[[Fetched], None] = lambda _: None
        self._reader = threading.Thread(target=self._read, name="isthmus-fetch", daemon=True)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.tiers)

    def start(self, emit: Callable[[Fetched], None]) -> None:
        """Begin to load, write and read; ``emit`` is called on a thread of this object."""
        if not self.tiers:
            return
        self._emit = emit
        for writer in self._writers:
            writer.start()
        self._reader.start()

    def close(self) -> None:
        """Write what waits, within ``CLOSE_S``, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._reader.is_alive():
            self._reader.join(CLOSE_S)
        for writer in self._writers:
            writer.close()

    def keep(self, blocks: Iterable[StoredBlock]) -> None:
        """Put ``blocks`` into every tier that lacks them, later."""
        for block in blocks:
            for writer in self._writers:
                writer.put(block)

    def paying(self, block_bytes: int, block_ns: float) -> tuple[str, ...]:
        """The tiers that read a block of ``block_bytes`` in less than ``block_ns``, or whose speed is not known.

        Both sides grow with the number of blocks alike: reading ``n`` of them takes ``n * block_bytes / rate``, what
        they save is ``n * block_ns``, the time to compute and send their tokens.
        """
        rates = ((tier.name, self._rates[tier.name].bytes_per_s) for tier in self.tiers)
        return tuple(name for name, rate in rates if not rate or block_bytes * 1e9 / rate < block_ns)

    def may_hold(self, names: Iterable[bytes], tiers: Sequence[str]) -> bool:
        """Whether one of ``tiers`` might have one of ``names``."""
        return any(tier.may_hold(name) for name in names for tier in self.tiers if tier.name in tiers)

    def fetch(self, job: Fetch) -> bool:
        """Read what ``job`` says; a :class:`Fetched` comes unless this returns False, for too many wait."""
        with self._changed:
            if len(self._jobs) >= MAX_FETCHES or self._closing:
                return False
            self._jobs.append((job, time.monotonic_ns()))
            self._changed.notify()
        return True

    def status(self, hits: Callable[[str], tuple[int, int]]) -> list[TierStatus]:
        """Each tier; ``hits`` says by its name how many requests and tokens it has served."""
        found = []
        for tier in self.tiers:
            served, tokens = hits(tier.name)
            found.append(
                TierStatus(
                    name=tier.name,
                    used_bytes=tier.used_bytes,
                    capacity_bytes=tier.capacity_bytes,
                    blocks=len(tier),
                    hits=served,
                    hit_tokens=tokens,
                    evictions=tier.losses.evictions,
                    evicted=dict(tier.losses.evicted),
                    refused=dict(tier.losses.refused),
                    corrupt_blocks=tier.corrupt_blocks,
                    read_bytes_per_s=self._rates[tier.name].last_bytes_per_s,
                )
            )
        return found

    def _read(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                job, asked_ns = self._jobs.popleft()
            try:
                pieces = self._pieces(job)
            except Exception:
                # Nothing that a store does may end this thread: requests wait for it.
                log.exception("KV could not be fetched", request_id=job.request_id)
                pieces = []
            self._emit(Fetched(job.request_id, pieces, time.monotonic_ns() - asked_ns))

    def _pieces(self, job: Fetch) -> list[Piece]:
        pieces: list[Piece] = []
        while time.monotonic_ns() < job.deadline_ns:
            more = self._next(job, len(pieces))
            pieces += more
            if not more:
                break
        return pieces

    def _next(self, job: Fetch, at: int) -> list[Piece]:
        """The next few blocks, from the first tier that has any."""
        for tier in self.tiers:
            if tier.name not in job.tiers:
                continue
            for fidelity, names in job.chains:
                began_ns = time.monotonic_ns()
                got = tier.get(names[at : at + BLOCKS_PER_LOOK])
                if got:
                    num_bytes = sum(payload.size for payload in got)
                    self._rates[tier.name].observe(num_bytes, time.monotonic_ns() - began_ns)
                    return [Piece(payload, fidelity, tier.name) for payload in got]
        return []


class ReadRate:
    """How fast a tier has been read lately."""

    def __init__(self) -> None:
        self.last_bytes_per_s = 0.0
        self._measured_ns = 0

    @property
    def bytes_per_s(self) -> float:
        """Smoothed; 0 where nothing was read for ``RATE_S``."""
        fresh = time.monotonic_ns() - self._measured_ns < RATE_S * 1e9
        return self.last_bytes_per_s if fresh else 0.0

    def observe(self, num_bytes: int, took_ns: int) -> None:
        """Learn from one read."""
        now = num_bytes * 1e9 / max(took_ns, 1)
        before = self.bytes_per_s or now
        self.last_bytes_per_s = before + _SMOOTHING * (now - before)
        self._measured_ns = time.monotonic_ns()


class _Writer:
    """Puts blocks into one tier, in the order in which they come."""

    def __init__(self, tier: Tier, max_bytes: int) -> None:
        self._tier = tier
        self._max_bytes = max_bytes
        self._waiting: deque[StoredBlock] = deque()
        self._waiting_bytes = 0
        self._waiting_names: set[bytes] = set()
        self._changed = threading.Condition()
        self._closing_ns = 0
        self._thread = threading.Thread(target=self._write, name=f"isthmus-{tier.name}", daemon=True)

    def start(self) -> None:
        """Load the tier, then write."""
        self._thread.start()

    def put(self, block: StoredBlock) -> None:
        """Write ``block`` later, unless it is there or too much waits."""
        if self._tier.holds(block.name):
            return
        with self._changed:
            if block.name in self._waiting_names:
                return
            if self._waiting_bytes + block.num_bytes > self._max_bytes:
                self._tier.losses.refused["behind"] += 1
                return
            self._waiting.append(block)
            self._waiting_names.add(block.name)
            self._waiting_bytes += block.num_bytes
            self._changed.notify()

    def close(self) -> None:
        """Write what waits, as far as there is time, and end."""
        with self._changed:
            self._closing_ns = time.monotonic_ns() + int(CLOSE_S * 1e9)
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(2 * CLOSE_S)
        self._tier.close()

    def _write(self) -> None:
        self._tier.load()
        while True:
            with self._changed:
                while not self._waiting and not self._closing_ns:
                    self._changed.wait()
                if self._closing_ns and (not self._waiting or time.monotonic_ns() > self._closing_ns):
                    return
                block = self._waiting.popleft()
            try:
                self._tier.put(block)
            except Exception:
                log.exception("KV could not be written", tier=self._tier.name)
                self._tier.losses.refused["failed"] += 1
            with self._changed:
                self._waiting_names.discard(block.name)
                self._waiting_bytes -= block.num_bytes
