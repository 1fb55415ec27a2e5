"""What a prompt need not compute or wait for: cells that running sequences share with it, and blocks of KV in RAM.

A running sequence lends the cells of its prompt. A finished one leaves its KV in RAM at once, for cells that only wait
make every decode step slower. Both count for requests of the same tenant that ask for as good KV or less: what came by
a lossy codec, or was computed after such KV, serves requests for that codec only. Whatever is in RAM goes to the tiers
below as well (``pool/``), and what they give back comes through RAM.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpu_decode.pool.below import Fetched, LowerTiers, Piece
from cpu_decode.pool.block_log import BlockLog
from cpu_decode.pool.stored import StoredBlock
from cpu_decode.prefix import LEAST_TOKENS, Block, PrefixTree
from cpu_decode.state import state_bytes
from transfer import blocks as block_names
from transfer import codecs
from transfer.blocks import EXACT
from transfer.geometry import KVGeometry
from transfer.layout import CellType
from transfer.messages import Reserve, TierStatus

LOSSLESS = ("raw", "lz4", "zstd")

Tokens = npt.NDArray[np.int32]


class Scope(NamedTuple):
    """Who may share KV: requests of one ``tenant`` that want it of ``fidelity``, a lossy codec or ``EXACT``."""

    fidelity: str = EXACT
    tenant: str = ""


class Plan(NamedTuple):
    """Where the first ``num_tokens`` tokens of a prompt come from.

    The cells of the first ``shared_tokens`` are those of the sequence ``donor``; the others are in the blocks of
    ``path`` that end behind those. It took ``fetch_ns`` to get some of them back from below RAM.
    """

    num_tokens: int = 0
    donor: int | None = None
    shared_tokens: int = 0
    path: tuple[Block, ...] = ()
    fetch_ns: int = 0

    @property
    def restored_tokens(self) -> int:
        """Tokens whose KV has to come back into cells."""
        return self.num_tokens - self.shared_tokens

    @property
    def pieces(self) -> list[tuple[Block, range]]:
        """The blocks to inject, each with the positions that are needed of it."""
        return [
            (block, range(max(block.start_token, self.shared_tokens), min(block.end_token, self.num_tokens)))
            for block in self.path
            if block.end_token > self.shared_tokens
        ]


class Missing(NamedTuple):
    """Blocks of a prompt that RAM lacks, from the block ``first`` on; ``chains`` are their names by fidelity."""

    first: int
    chains: tuple[tuple[str, list[bytes]], ...]

    @property
    def num_blocks(self) -> int:
        """How many there are."""
        return len(self.chains[0][1])


class PrefixCache:
    """Finds prefixes among the sequences that lend and the blocks that were kept, ``max_bytes`` of them; 0 finds none.

    Owned by the I/O thread; the engine copies cells and fills and reads blocks in the order in which it is told to.
    Blocks are named by the pool's ``seed``; ``known`` hears of those that come and go, ``below`` gets them. Cells that
    are not ``unified`` are not shared.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        cell_type: CellType,
        max_bytes: int,
        seed: bytes = b"",
        known: BlockLog | None = None,
        below: LowerTiers | None = None,
        *,
        unified: bool = True,
    ) -> None:
        self._cell_type = cell_type
        self._max_bytes = max_bytes
        self._on = max_bytes > 0
        # llama.cpp gives cells that a sliding window has left to other tokens: they cannot be lent, and are copied
        # before (``window_blocks.py``).
        self._lends = self._on and unified and not geometry.sliding_window
        self._unified = unified
        self.block_tokens = block_names.tokens_per_block(geometry)
        self.block_bytes = state_bytes(geometry, self.block_tokens, cell_type)
        self.cell_bytes = state_bytes(geometry, 1, cell_type) - state_bytes(geometry, 0, cell_type)
        self._tree = PrefixTree(
            self.block_tokens, max_bytes, lambda num_tokens: state_bytes(geometry, num_tokens, cell_type), self._gone
        )
        self._lent: dict[int, tuple[Tokens, Scope, list[bytes]]] = {}
        self.seed = seed
        self.known = known or BlockLog()
        self.below = below or LowerTiers()
        self._hits: Counter[str] = Counter()
        self._hit_tokens: Counter[str] = Counter()
        self.hits = 0
        self.reused_tokens = 0

    @property
    def used_bytes(self) -> int:
        """Size of the blocks."""
        return self._tree.used_bytes

    @property
    def num_prefixes(self) -> int:
        """Kept prefixes that are not part of a longer one."""
        return self._tree.num_prefixes

    def tiers(self, used_cells: int, num_cells: int) -> tuple[TierStatus, ...]:
        """What each tier holds and has given back, the fastest first; the cells' own numbers are the caller's."""
        cells = TierStatus(
            name="cells",
            used_bytes=used_cells * self.cell_bytes,
            capacity_bytes=num_cells * self.cell_bytes,
            blocks=sum(len(names) for _, _, names in self._lent.values()),
            hits=self._hits["cells"],
            hit_tokens=self._hit_tokens["cells"],
        )
        ram = TierStatus(
            name="ram",
            used_bytes=self.used_bytes,
            capacity_bytes=self._max_bytes,
            blocks=len(self._tree),
            hits=self._hits["ram"],
            hit_tokens=self._hit_tokens["ram"],
            evictions=self._tree.losses.evictions,
            evicted=dict(self._tree.losses.evicted),
            refused=dict(self._tree.losses.refused),
        )
        return (cells, ram, *self.below.status(lambda name: (self._hits[name], self._hit_tokens[name])))

    def scope(self, reserve: Reserve) -> Scope | None:
        """With whom a request shares KV; None if with nobody.

        Lossy is what comes by a lossy codec; a local prefill is exact, and so are rows as llama.cpp would write them.
        """
        if not (self._on and reserve.reuse):
            return None
        lossless = reserve.codec in LOSSLESS or codecs.by_name(reserve.codec).lands_in == (self._cell_type,)
        return Scope(EXACT if lossless or reserve.source == "local" else reserve.codec, reserve.tenant)

    def find(self, prompt: list[int], scope: Scope | None) -> Plan:
        """The longest prefix of ``prompt``, short of its last token, whose logits are wanted."""
        if scope is None:
            return Plan()
        wanted = prompt[:-1]
        donor, shared_tokens = self._longest_lent(np.array(wanted, np.int32), scope)
        path, kept_tokens = self._tree.match(wanted, *scope)
        if max(shared_tokens, kept_tokens) < LEAST_TOKENS:
            return Plan()
        if kept_tokens <= shared_tokens:
            return Plan(shared_tokens, donor, shared_tokens)
        return Plan(kept_tokens, donor, shared_tokens, tuple(path), sum(block.fetch_ns for block in path))

    def use(self, plan: Plan) -> None:
        """Keep what ``plan`` needs until :meth:`used`."""
        self._tree.pin(plan.path)
        self.hits += plan.num_tokens > 0
        self.reused_tokens += plan.num_tokens
        tokens: Counter[str] = Counter(cells=plan.shared_tokens)
        for block, part in plan.pieces:
            tokens[block.tier] += len(part)
        for block in plan.path:
            block.tier, block.fetch_ns = "ram", 0
        self._hit_tokens += tokens
        self._hits += Counter(tier for tier, count in tokens.items() if count)

    def used(self, plan: Plan) -> None:
        """The blocks of ``plan`` have been read."""
        self._tree.unpin(plan.path)

    def lend(self, seq_id: int, prompt: list[int], scope: Scope | None) -> None:
        """The cells of ``seq_id`` hold ``prompt`` now and stay until :meth:`take_back`."""
        if self._lends and scope is not None:
            names = self._names(prompt, scope.fidelity, scope.tenant)
            self._lent[seq_id] = np.array(prompt, np.int32), scope, names
            self.known.add("cells", names)

    def take_back(self, seq_id: int) -> None:
        """Nobody else may share cells with ``seq_id`` from now on."""
        if lent := self._lent.pop(seq_id, None):
            self.known.remove("cells", lent[2])

    def keep(self, tokens: list[int], scope: Scope | None) -> list[Block]:
        """Make room for the KV of ``tokens``; returns its blocks, to be filled where they are not saved."""
        if scope is None:
            return []
        path = self._tree.extend(tokens, *scope)
        self._name(path, tokens, scope)
        return path

    def keep_early(self, prompt: list[int], scope: Scope | None) -> list[Block]:
        """The same for the full blocks of a prompt whose request still runs.

        If there are tiers that outlive it, or if others cannot share the cells of a stream.
        """
        if self._unified and not self.below:
            return []
        return self.keep(prompt[: len(prompt) // self.block_tokens * self.block_tokens], scope)

    def kept(self, path: list[Block]) -> None:
        """The engine has filled the blocks of ``path``, except those that it could not."""
        self._tree.unpin(path)
        for block in path:
            if not block.saved:
                self._tree.discard(block)
        self._publish(path)

    def missing(self, prompt: list[int], scope: Scope | None) -> Missing | None:
        """The blocks that the tiers below might have beyond what :meth:`find` finds; None if there are none."""
        if scope is None or not self.below:
            return None
        size, wanted = self.block_tokens, prompt[:-1]
        _, shared_tokens = self._longest_lent(np.array(wanted, np.int32), scope)
        first = self._tree.match(wanted, *scope).num_tokens // size
        # No more than RAM can take.
        end = min(len(wanted) // size, self._max_bytes // self.block_bytes)
        if end <= first or end * size <= shared_tokens:
            return None
        fidelities = dict.fromkeys((EXACT, scope.fidelity))
        names = ((fidelity, self._names(wanted[: end * size], fidelity, scope.tenant)) for fidelity in fidelities)
        return Missing(first, tuple((fidelity, found[first:]) for fidelity, found in names))

    def take_in(self, prompt: list[int], scope: Scope, first: int, fetched: Fetched) -> None:
        """Put what was fetched for ``prompt``, from the block ``first`` on, into RAM."""
        size, at = self.block_tokens, first
        if self._tree.match(prompt[: first * size], *scope).num_tokens < first * size:
            # What stands before it has gone meanwhile.
            return
        for fidelity, run in groupby(fetched.pieces, key=lambda piece: piece.fidelity):
            pieces = list(run)
            path = self._tree.extend(prompt[: (at + len(pieces)) * size], fidelity, scope.tenant)
            self._name(path, prompt, scope)
            for block, piece in zip(path[at:], pieces, strict=False):
                _fill(block, piece, fetched.took_ns // len(fetched.pieces))
            self._tree.unpin(path)
            for block in path[at:]:
                if not block.saved and not block.pins:
                    self._tree.discard(block)
            self._publish(path)
            at += len(pieces)

    def _longest_lent(self, wanted: Tokens, scope: Scope) -> tuple[int | None, int]:
        known = [
            (seq_id, prompt)
            for seq_id, (prompt, theirs, _) in self._lent.items()
            if theirs.fidelity in (EXACT, scope.fidelity) and theirs.tenant == scope.tenant
        ]
        shared = [(_common_tokens(prompt, wanted), seq_id) for seq_id, prompt in known]
        num_tokens, donor = max(shared, default=(0, None))
        return (donor, num_tokens) if num_tokens >= LEAST_TOKENS else (None, 0)

    def _names(self, tokens: Sequence[int], fidelity: str, tenant: str) -> list[bytes]:
        root = block_names.root(self.seed, fidelity, tenant)
        return list(block_names.names(root, tokens, self.block_tokens))

    def _name(self, path: Sequence[Block], tokens: Sequence[int], scope: Scope) -> None:
        """Give the full blocks of ``path``, which hold the first of ``tokens``, their names."""
        nameless: dict[str, list[tuple[int, Block]]] = defaultdict(list)
        for at, block in enumerate(path):
            if not block.name and len(block.tokens) == self.block_tokens:
                nameless[block.fidelity].append((at, block))
        for fidelity, found in nameless.items():
            prefix = tokens[: (found[-1][0] + 1) * self.block_tokens]
            # The last block may go on behind these tokens.
            whole = [*prefix, *found[-1][1].tokens[len(prefix) - found[-1][0] * self.block_tokens :]]
            names = self._names(whole, fidelity, scope.tenant)
            for at, block in found:
                block.name = names[at]

    def _publish(self, path: Sequence[Block]) -> None:
        """Tell everybody of the blocks of ``path`` that have a name and KV."""
        there = [block for block in path if block.saved and block.name]
        unlisted = [block for block in there if not block.listed]
        self.known.add("ram", (block.name for block in unlisted))
        for block in unlisted:
            block.listed = True
        if self.below:
            self.below.keep(
                StoredBlock(block.name, self.seed, block.start_token, len(block.tokens), block.buffer)
                for block in there
            )

    def _gone(self, block: Block) -> None:
        if block.listed:
            self.known.remove("ram", [block.name])


def _fill(block: Block, piece: Piece, fetch_ns: int) -> None:
    """Let ``block`` have the KV of ``piece``, unless it has some or that is not of its size."""
    if not block.saved and piece.payload.size == block.num_bytes:
        block.buffer, block.saved = piece.payload, True
        block.tier, block.fetch_ns = piece.tier, fetch_ns


def _common_tokens(a: Tokens, b: Tokens) -> int:
    length = min(a.size, b.size)
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if different.size else length
