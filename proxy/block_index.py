"""Which blocks of KV a worker has, as far as its heartbeats have said: what of a prompt it need not compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

from transfer import blocks
from transfer.blocks import EXACT
from transfer.messages import IndexUpdate, Welcome

# The best one first: what a prompt begins with is as slow as the slowest tier that it needs.
TIERS = ("cells", "ram", "disk", "shared")


class Held(NamedTuple):
    """The first ``tokens`` of a prompt are held, some of them in ``tier`` and none in a slower one; "" if none are."""

    tokens: int = 0
    tier: str = ""


class BlockIndex:
    """A copy of one worker's index, kept by :meth:`take`. What is stale in it costs time, never an answer."""

    def __init__(self) -> None:
        self.version = 0
        self._tiers: dict[bytes, str] = {}

    def __len__(self) -> int:
        return len(self._tiers)

    def tier(self, name: bytes) -> str | None:
        """Where the block ``name`` is; None if nowhere."""
        return self._tiers.get(blocks.index_key(name))

    def take(self, update: IndexUpdate) -> None:
        """Bring the copy up to date; an update of something else than this copy is left out, and asked for again."""
        if update.base_version == 0:
            self._tiers.clear()
        elif update.base_version != self.version:
            self.version = 0
            return
        for key in update.removed:
            self._tiers.pop(key, None)
        for tier, keys in update.added.items():
            self._tiers.update(dict.fromkeys(keys, tier))
        self.version = update.version

    def clear(self) -> None:
        """Nothing is known any more: the worker may have started anew."""
        self._tiers.clear()
        self.version = 0


def held(
    prompt: Sequence[int],
    tenant: str,
    fidelity: str,
    welcome: Welcome | None,
    index: BlockIndex,
    others: Sequence[BlockIndex] = (),
) -> Held:
    """How much of ``prompt`` the worker of ``welcome`` and ``index`` holds for ``tenant``, in full blocks.

    What came by the lossy codec ``fidelity`` counts as well as exact KV, and so do blocks that one of ``others`` has on
    the shared server. The prompt's last token never does: its logits are wanted.
    """
    if welcome is None or not welcome.pool_seed:
        return Held()
    size = blocks.tokens_per_block(welcome.geometry)
    tokens, slowest = 0, -1
    for names in _names(prompt[:-1], tenant, fidelity, welcome.pool_seed, size):
        found = (index.tier(name) or _shared(name, others) for name in names if name)
        best = min((TIERS.index(tier) for tier in found if tier in TIERS), default=None)
        if best is None:
            break
        tokens, slowest = tokens + size, max(slowest, best)
    return Held(tokens, TIERS[slowest]) if tokens else Held()


def _names(prompt: Sequence[int], tenant: str, fidelity: str, seed: bytes, size: int) -> Iterator[tuple[bytes, ...]]:
    """Each block's names, one for each fidelity that serves; made one by one, for few prompts are held to the end."""
    roots = (blocks.root(seed, kind, tenant) for kind in dict.fromkeys((EXACT, fidelity)))
    return zip_longest(*(blocks.names(root, prompt, size) for root in roots), fillvalue=b"")


def _shared(name: bytes, others: Sequence[BlockIndex]) -> str | None:
    return "shared" if any(index.tier(name) == "shared" for index in others) else None
