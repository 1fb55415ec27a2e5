"""Which token prefixes have KV in RAM: a radix tree of token blocks, bounded in bytes.

A block stands for the tokens of its ancestors and its own; only blocks of full length have children. Every prompt that
begins with the same tokens finds the same blocks, so what conversations share is kept once; tenants share nothing.
Plain bookkeeping, owned by the worker's I/O thread; the engine fills and reads the blocks' buffers.

Eviction is a segmented LRU (``segmented.py``). A block is used before its ancestors are, so in the order of eviction it
comes before them, and whatever goes is a leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpu_decode.pool.losses import Losses
from cpu_decode.segmented import SegmentedLru
from transfer.blocks import EXACT

# A few tokens are computed or sent as fast as they are fetched.
LEAST_TOKENS = 16


class Block:
    """KV of ``tokens`` at positions from ``start_token`` on, as llama.cpp's state in ``buffer``, once ``saved``.

    ``fidelity`` is the lossy codec that it, or KV before it, came by, or ``EXACT``. ``name`` is what the lower tiers
    and the proxy's index call it (``transfer/blocks.py``); it is ``listed`` once they know. Until its first use,
    ``tier`` says that it was fetched from below, in ``fetch_ns``.
    """

    def __init__(self, parent: Block | None, tokens: tuple[int, ...], fidelity: str, num_bytes: int) -> None:
        self.parent = parent
        self.start_token: int = parent.end_token if parent else 0
        self.tokens = tokens
        self.fidelity = fidelity
        self.num_bytes = num_bytes
        self.buffer: npt.NDArray[np.uint8] = np.empty(num_bytes, np.uint8)
        self.saved = False
        self.name = b""
        self.listed = False
        self.tier = "ram"
        self.fetch_ns = 0
        self.children: dict[tuple[tuple[int, ...], str], Block] = {}
        self.pins = 0

    @property
    def end_token(self) -> int:
        """The position after the last token."""
        return self.start_token + len(self.tokens)

    @property
    def path(self) -> list[Block]:
        """The block behind its ancestors, the first one first."""
        blocks: list[Block] = []
        block: Block | None = self
        while block is not None and block.tokens:
            blocks.append(block)
            block = block.parent
        return blocks[::-1]


class Match(NamedTuple):
    """The first ``num_tokens`` tokens that were asked for lie in ``blocks``, in the last of them perhaps not all."""

    blocks: list[Block]
    num_tokens: int


class PrefixTree:
    """Blocks of ``block_tokens`` tokens, or fewer at a prefix's end, in ``max_bytes`` at most.

    ``block_bytes(n)`` is the size of a block of n tokens; ``on_gone`` is told of every block that is forgotten.
    """

    def __init__(
        self,
        block_tokens: int,
        max_bytes: int,
        block_bytes: Callable[[int], int],
        on_gone: Callable[[Block], None] = lambda _: None,
    ) -> None:
        self._block_tokens = block_tokens
        self._max_bytes = max_bytes
        self._block_bytes = block_bytes
        self._on_gone = on_gone
        self._roots: dict[str, Block] = {}
        self._blocks: SegmentedLru[Block] = SegmentedLru(max_bytes)
        self.losses = Losses()

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def used_bytes(self) -> int:
        """Size of all blocks."""
        return self._blocks.used_bytes

    @property
    def num_prefixes(self) -> int:
        """Prefixes that are not part of a longer one."""
        return sum(not block.children for block in self._blocks)

    def match(self, tokens: Sequence[int], fidelity: str, tenant: str = "") -> Match:
        """The longest known prefix of ``tokens``, of ``fidelity`` or exact; counts as a use of its blocks."""
        root = self._roots.get(tenant)
        if root is None:
            return Match([], 0)
        at, level, deeper = 0, [root], [root]
        while deeper:
            level = deeper
            due = tuple(tokens[at : at + self._block_tokens])
            found = (parent.children.get((due, theirs)) for parent in level for theirs in {EXACT, fidelity})
            deeper = [block for block in found if block is not None and len(due) == self._block_tokens]
            at += self._block_tokens if deeper else 0
        best, same = level[0], 0
        for parent in level:
            for block in parent.children.values():
                # Most differ soon, and there may be thousands.
                longer = block.tokens[: same + 1] == due[: same + 1] and len(due) > same
                if longer and block.fidelity in (EXACT, fidelity):
                    best, same = block, _common_tokens(block.tokens, due)
        blocks = best.path
        # Every prompt may begin with the same few tokens: that says nothing about what comes again.
        of_use = blocks[:-1] if 0 < same < LEAST_TOKENS else blocks
        self._blocks.use(reversed(of_use))
        return Match(blocks, at + same)

    def extend(self, tokens: Sequence[int], fidelity: str, tenant: str = "") -> list[Block]:
        """Take ``tokens`` in as far as there is room; returns their blocks, pinned. New ones are not ``saved``."""
        path: list[Block] = []
        root = parent = self._roots.get(tenant) or Block(None, (), EXACT, 0)
        for at in range(0, len(tokens), self._block_tokens):
            due = tuple(tokens[at : at + self._block_tokens])
            block = _child(parent, due, fidelity) or self._add(parent, due, fidelity)
            if block is None:
                break
            block.pins += 1
            path.append(block)
            parent = block
        # The last block of others under this root may have made room.
        if root.children:
            self._roots[tenant] = root
        self._blocks.renew(reversed(path))
        return path

    def pin(self, blocks: Iterable[Block]) -> None:
        """Keep ``blocks``, a path from its beginning, until :meth:`unpin`."""
        for block in blocks:
            block.pins += 1

    def unpin(self, blocks: Iterable[Block]) -> None:
        """Take a pin back."""
        for block in blocks:
            block.pins -= 1

    def discard(self, block: Block) -> None:
        """Forget ``block`` and all that continue it, pinned or not."""
        for child in list(block.children.values()):
            self.discard(child)
        if block in self._blocks:
            self._blocks.remove(block)
            parent = block.parent
            if parent is not None:
                del parent.children[block.tokens, block.fidelity]
                if parent.parent is None and not parent.children:
                    self._roots = {tenant: root for tenant, root in self._roots.items() if root is not parent}
            self._on_gone(block)

    def _add(self, parent: Block, tokens: tuple[int, ...], fidelity: str) -> Block | None:
        """A new block on probation, in the place of what it continues; None if there is no room for it."""
        for block in [b for b in parent.children.values() if b.fidelity == fidelity and _begins(tokens, b.tokens)]:
            if not block.pins:
                self.losses.evicted["superseded"] += 1
                self.discard(block)
        num_bytes = self._block_bytes(len(tokens))
        while self.used_bytes + num_bytes > self._max_bytes:
            victim = next((block for block in self._blocks if not block.pins), None)
            if victim is None:
                self.losses.refused["busy" if num_bytes <= self._max_bytes else "too_large"] += 1
                return None
            self.losses.evicted["capacity" if self._blocks.is_protected(victim) else "probation"] += 1
            self.discard(victim)
        block = Block(parent, tokens, fidelity, num_bytes)
        parent.children[tokens, fidelity] = block
        self._blocks.add(block, num_bytes)
        return block


def _child(parent: Block, due: tuple[int, ...], fidelity: str) -> Block | None:
    """The child of ``parent`` that holds all of ``due``, of ``fidelity`` or exact."""
    for theirs in (EXACT, fidelity):
        if block := parent.children.get((due, theirs)):
            return block
    children = (block for block in parent.children.values() if block.fidelity in (EXACT, fidelity))
    return next((block for block in children if _begins(block.tokens, due)), None)


def _common_tokens(known: tuple[int, ...], due: tuple[int, ...]) -> int:
    different = (at for at, (a, b) in enumerate(zip(known, due, strict=False)) if a != b)
    return next(different, min(len(known), len(due)))


def _begins(tokens: tuple[int, ...], shorter: tuple[int, ...]) -> bool:
    return len(shorter) < len(tokens) and tokens[: len(shorter)] == shorter
