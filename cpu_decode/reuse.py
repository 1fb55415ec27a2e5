"""What a prompt need not compute or wait for: cells that running sequences share with it, and blocks of KV in RAM.

A running sequence lends the cells of its prompt. A finished one leaves its KV in RAM at once, for cells that only wait
make every decode step slower. Both count for requests that ask for as good KV or less: what came by a lossy codec, or
was computed after such KV, serves requests for that codec only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpu_decode.prefix import EXACT, Block, PrefixTree
from cpu_decode.state import state_bytes
from transfer import codecs
from transfer.geometry import KVGeometry
from transfer.layout import CellType
from transfer.messages import Reserve

BLOCK_TOKENS = 64
# A few tokens are computed or sent as fast as they are fetched.
LEAST_TOKENS = 16
LOSSLESS = ("raw", "lz4", "zstd")

Tokens = npt.NDArray[np.int32]


class Plan(NamedTuple):
    """Where the first ``num_tokens`` tokens of a prompt come from.

    The cells of the first ``shared_tokens`` are those of the sequence ``donor``; the others are in the blocks of
    ``path`` that end behind those.
    """

    num_tokens: int = 0
    donor: int | None = None
    shared_tokens: int = 0
    path: tuple[Block, ...] = ()

    @property
    def pieces(self) -> list[tuple[Block, range]]:
        """The blocks to inject, each with the positions that are needed of it."""
        return [
            (block, range(max(block.start_token, self.shared_tokens), min(block.end_token, self.num_tokens)))
            for block in self.path
            if block.end_token > self.shared_tokens
        ]


class PrefixCache:
    """Finds prefixes among the sequences that lend and the blocks that were kept, ``max_bytes`` of them; 0 finds none.

    Owned by the I/O thread; the engine copies cells and fills and reads blocks in the order in which it is told to.
    """

    def __init__(self, geometry: KVGeometry, cell_type: CellType, max_bytes: int) -> None:
        self._cell_type = cell_type
        self._on = max_bytes > 0
        # llama.cpp gives cells that a sliding window has left to other tokens: they can be neither lent nor, in longer
        # blocks, read back.
        self._lends = self._on and not geometry.sliding_window
        block_tokens = min(BLOCK_TOKENS, geometry.sliding_window or BLOCK_TOKENS)
        self._tree = PrefixTree(
            block_tokens, max_bytes, lambda num_tokens: state_bytes(geometry, num_tokens, cell_type)
        )
        self._lent: dict[int, tuple[Tokens, str]] = {}
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

    def fidelity(self, reserve: Reserve) -> str:
        """What the KV of a request is like: exact, or the lossy codec by which it comes."""
        lossless = reserve.codec in LOSSLESS or codecs.by_name(reserve.codec).lands_in == (self._cell_type,)
        return EXACT if lossless or reserve.source == "local" else reserve.codec

    def find(self, prompt: list[int], fidelity: str) -> Plan:
        """The longest prefix of ``prompt``, short of its last token, whose logits are wanted."""
        if not self._on:
            return Plan()
        wanted = prompt[:-1]
        donor, shared_tokens = self._longest_lent(np.array(wanted, np.int32), fidelity)
        blocks, kept_tokens = self._tree.match(wanted, fidelity)
        if max(shared_tokens, kept_tokens) < LEAST_TOKENS:
            return Plan()
        if kept_tokens <= shared_tokens:
            return Plan(shared_tokens, donor, shared_tokens)
        return Plan(kept_tokens, donor, shared_tokens, tuple(blocks))

    def use(self, plan: Plan) -> None:
        """Keep what ``plan`` needs until :meth:`used`."""
        self._tree.pin(plan.path)
        self.hits += plan.num_tokens > 0
        self.reused_tokens += plan.num_tokens

    def used(self, plan: Plan) -> None:
        """The blocks of ``plan`` have been read."""
        self._tree.unpin(plan.path)

    def lend(self, seq_id: int, prompt: list[int], fidelity: str) -> None:
        """The cells of ``seq_id`` hold ``prompt`` now and stay until :meth:`take_back`."""
        if self._lends:
            self._lent[seq_id] = np.array(prompt, np.int32), fidelity

    def take_back(self, seq_id: int) -> None:
        """Nobody else may share cells with ``seq_id`` from now on."""
        self._lent.pop(seq_id, None)

    def keep(self, tokens: list[int], fidelity: str) -> list[Block]:
        """Make room for the KV of ``tokens``; returns its blocks, to be filled where they are not saved."""
        return self._tree.extend(tokens, fidelity) if self._on else []

    def kept(self, blocks: list[Block]) -> None:
        """The engine has filled ``blocks``, except those that it could not."""
        self._tree.unpin(blocks)
        for block in blocks:
            if not block.saved:
                self._tree.discard(block)

    def _longest_lent(self, wanted: Tokens, fidelity: str) -> tuple[int | None, int]:
        known = [(seq_id, prompt) for seq_id, (prompt, theirs) in self._lent.items() if theirs in (EXACT, fidelity)]
        shared = [(_common_tokens(prompt, wanted), seq_id) for seq_id, prompt in known]
        num_tokens, donor = max(shared, default=(0, None))
        return (donor, num_tokens) if num_tokens >= LEAST_TOKENS else (None, 0)


def _common_tokens(a: Tokens, b: Tokens) -> int:
    length = min(a.size, b.size)
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if different.size else length
