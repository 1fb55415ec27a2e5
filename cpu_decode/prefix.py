"""Which token prefixes have KV in RAM: a radix tree of token blocks, bounded in bytes.

A block stands for the tokens of its ancestors and its own; only blocks of full length have children. Every prompt that
begins with the same tokens finds the same blocks, so what conversations share is kept once. Plain bookkeeping, owned by
the worker's I/O thread; the engine fills and reads the blocks' buffers.

Eviction is a segmented LRU (Karedla, Love, Wherry: Caching strategies to improve disk system performance, IEEE Computer
27(3), 1994), which a scan does not empty: new blocks are on probation, a second use protects them, and only what is on
probation goes. Protected blocks come back on probation when others have taken their share. A block is used before its
ancestors are, so in the order of eviction it comes before them, and whatever goes is a leaf.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# The share of the bytes that blocks in second use may keep from new ones.
PROTECTED_SHARE = 0.8
# KV that is as good as the worker's own; lossy codecs are classes of their own.
EXACT = ""


class Block:
    """KV of ``tokens`` at positions from ``start_token`` on, as llama.cpp's state in ``buffer``, once ``saved``.

    ``fidelity`` is the lossy codec that it, or KV before it, came by, or ``EXACT``.
    """

    def __init__(self, parent: Block | None, tokens: tuple[int, ...], fidelity: str, num_bytes: int) -> None:
        self.parent = parent
        self.start_token: int = parent.end_token if parent else 0
        self.tokens = tokens
        self.fidelity = fidelity
        self.num_bytes = num_bytes
        self.buffer: npt.NDArray[np.uint8] = np.empty(num_bytes, np.uint8)
        self.saved = False
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

    ``block_bytes(n)`` is the size of a block of n tokens.
    """

    def __init__(self, block_tokens: int, max_bytes: int, block_bytes: Callable[[int], int]) -> None:
        self._block_tokens = block_tokens
        self._max_bytes = max_bytes
        self._block_bytes = block_bytes
        self._root = Block(None, (), EXACT, 0)
        # The block that goes first comes first.
        self._probation: OrderedDict[Block, None] = OrderedDict()
        self._protected: OrderedDict[Block, None] = OrderedDict()
        self._protected_bytes = 0
        self.used_bytes = 0

    @property
    def num_prefixes(self) -> int:
        """Prefixes that are not part of a longer one."""
        return sum(not block.children for segment in (self._probation, self._protected) for block in segment)

    def match(self, tokens: Sequence[int], fidelity: str) -> Match:
        """The longest known prefix of ``tokens``, of ``fidelity`` or exact; counts as a use of its blocks."""
        at, level, deeper = 0, [self._root], [self._root]
        while deeper:
            level = deeper
            due = tuple(tokens[at : at + self._block_tokens])
            found = (parent.children.get((due, theirs)) for parent in level for theirs in {EXACT, fidelity})
            deeper = [block for block in found if block is not None and len(due) == self._block_tokens]
            at += self._block_tokens if deeper else 0
        best, same = level[0], 0
        for parent in level:
            for block in parent.children.values():
                if block.fidelity in (EXACT, fidelity) and (common := _common_tokens(block.tokens, due)) > same:
                    best, same = block, common
        blocks = best.path
        self._protect(blocks)
        return Match(blocks, at + same)

    def extend(self, tokens: Sequence[int], fidelity: str) -> list[Block]:
        """Take ``tokens`` in as far as there is room; returns their blocks, pinned. New ones are not ``saved``."""
        path: list[Block] = []
        parent = self._root
        for at in range(0, len(tokens), self._block_tokens):
            due = tuple(tokens[at : at + self._block_tokens])
            block = _child(parent, due, fidelity) or self._add(parent, due, fidelity)
            if block is None:
                break
            block.pins += 1
            path.append(block)
            parent = block
        for block in reversed(path):
            self._segment(block).move_to_end(block)
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
        segment = self._segment(block)
        if block in segment:
            del segment[block]
            self.used_bytes -= block.num_bytes
            self._protected_bytes -= block.num_bytes if segment is self._protected else 0
            if block.parent is not None:
                del block.parent.children[block.tokens, block.fidelity]

    def _add(self, parent: Block, tokens: tuple[int, ...], fidelity: str) -> Block | None:
        """A new block on probation, in the place of what it continues; None if there is no room for it."""
        for block in [b for b in parent.children.values() if b.fidelity == fidelity and _begins(tokens, b.tokens)]:
            if not block.pins:
                self.discard(block)
        num_bytes = self._block_bytes(len(tokens))
        while self.used_bytes + num_bytes > self._max_bytes:
            victim = next((block for block in self._probation if not block.pins), None)
            if victim is None:
                return None
            self.discard(victim)
        block = Block(parent, tokens, fidelity, num_bytes)
        parent.children[tokens, fidelity] = block
        self._probation[block] = None
        self.used_bytes += num_bytes
        return block

    def _protect(self, blocks: list[Block]) -> None:
        for block in reversed(blocks):
            if block in self._probation:
                del self._probation[block]
                self._protected[block] = None
                self._protected_bytes += block.num_bytes
            self._protected.move_to_end(block)
        while self._protected_bytes > PROTECTED_SHARE * self._max_bytes:
            block, _ = self._protected.popitem(last=False)
            self._protected_bytes -= block.num_bytes
            self._probation[block] = None

    def _segment(self, block: Block) -> OrderedDict[Block, None]:
        return self._protected if block in self._protected else self._probation


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
