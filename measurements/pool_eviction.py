"""The pool's own tree of blocks against a plain LRU of the same size, on prompts that come by Zipf's law."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from cpu_decode.prefix import PrefixTree
from transfer.blocks import EXACT

BLOCK_TOKENS = 4
CAPACITY_BLOCKS = 100
PROMPTS = 20_000
EXPONENTS = (0.8, 1.0, 1.2)
# One-off prompts, so many times the capacity, between each two stretches of ordinary ones; as the issue asks for.
SCAN_CAPACITIES = 5
STRETCH = 200


def simulate(seed: int = 0) -> list[dict[str, Any]]:
    """A sample for each popularity, with and without scans: both hit rates, of the prompts that are not one-offs."""
    samples = []
    for exponent in EXPONENTS:
        prompts = zipf(exponent, PROMPTS, seed)
        for scan in (False, True):
            tree, lru = hit_rates(with_scans(prompts) if scan else prompts)
            samples.append({"part": "eviction", "exponent": exponent, "scan": scan, "tree": tree, "lru": lru})
    return samples


def zipf(exponent: float, count: int, seed: int, kinds: int = 1000) -> list[int]:
    """``count`` prompts by number, of ``kinds``; number k comes with a weight of ``1 / (k + 1) ** exponent``."""
    weights = 1.0 / np.arange(1, kinds + 1) ** exponent
    return [int(n) for n in np.random.default_rng(seed).choice(kinds, count, p=weights / weights.sum())]


def with_scans(prompts: list[int]) -> list[int]:
    """``prompts`` with a scan after every ``STRETCH`` of the first quarter; -1 stands for a one-off."""
    scan = [-1] * (SCAN_CAPACITIES * CAPACITY_BLOCKS)
    short = prompts[: len(prompts) // 4]
    return [n for at in range(0, len(short), STRETCH) for n in (*short[at : at + STRETCH], *scan)]


def hit_rates(prompts: list[int]) -> tuple[float, float]:
    """Of the tree and of an LRU, in prompts of one block each."""
    tree = PrefixTree(BLOCK_TOKENS, CAPACITY_BLOCKS * BLOCK_TOKENS, lambda tokens: tokens)
    lru: OrderedDict[tuple[int, ...], None] = OrderedDict()
    ours = theirs = asked = one_offs = 0
    for number in prompts:
        one_offs += number < 0
        tokens = (number if number >= 0 else -one_offs,) * BLOCK_TOKENS
        hit = tree.match(tokens, EXACT).num_tokens == BLOCK_TOKENS
        path = tree.extend(tokens, EXACT)
        for block in path:
            block.saved = True
        tree.unpin(path)
        if number >= 0:
            asked += 1
            ours += hit
            theirs += tokens in lru
        lru[tokens] = None
        lru.move_to_end(tokens)
        if len(lru) > CAPACITY_BLOCKS:
            lru.popitem(last=False)
    return ours / asked, theirs / asked
