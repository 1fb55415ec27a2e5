"""The tree against a model that compares with everything it was ever given, and its eviction against a plain LRU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cpu_decode.prefix import EXACT, Block, PrefixTree

BLOCK = 4
# Two tokens and long prefixes in common: branches, trims and repetitions all the time.
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=18)
fidelities = st.sampled_from([EXACT, "q8", "kvz1"])


def tree_of(num_tokens: int = 10_000) -> PrefixTree:
    return PrefixTree(BLOCK, num_tokens, lambda tokens: tokens)


def keep(tree: PrefixTree, tokens: list[int], fidelity: str = EXACT) -> list[Block]:
    path = tree.extend(tokens, fidelity)
    for block in path:
        block.saved = True
    tree.unpin(path)
    return path


def common(a: list[int], b: list[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(st.lists(st.tuples(prompts, fidelities), max_size=12), prompts, fidelities)
def test_the_longest_known_prefix_of_no_lower_fidelity_is_found(kept, wanted, fidelity):
    tree = tree_of()
    for tokens, theirs in kept:
        keep(tree, tokens, theirs)
    match = tree.match(wanted, fidelity)
    serving = [tokens for tokens, theirs in kept if theirs in (EXACT, fidelity)]
    assert match.num_tokens == max((common(tokens, wanted) for tokens in serving), default=0)
    found = [token for block in match.blocks for token in block.tokens]
    assert found[: match.num_tokens] == wanted[: match.num_tokens]
    assert all(block.fidelity in (EXACT, fidelity) for block in match.blocks)
    assert [block.start_token for block in match.blocks] == list(range(0, len(found), BLOCK))


def test_what_prompts_share_is_kept_once():
    tree = tree_of()
    system = list(range(100, 140))
    for user in range(32):
        keep(tree, [*system, user, user, user])
    assert tree.used_bytes == 40 + 32 * 3
    assert tree.num_prefixes == 32


def test_a_longer_prompt_takes_the_place_of_the_rest_that_it_continues():
    tree = tree_of()
    keep(tree, [1, 2, 3, 4, 5])
    keep(tree, [1, 2, 3, 4, 5, 6, 7])
    assert (tree.used_bytes, tree.num_prefixes) == (7, 1)
    keep(tree, [1, 2, 3, 4, 5, 6])
    assert tree.used_bytes == 7


def test_lossy_kv_is_kept_beside_exact_kv_only_where_that_is_missing():
    tree = tree_of()
    keep(tree, list(range(8)), "q8")
    assert tree.match(list(range(8)), EXACT).num_tokens == 0
    keep(tree, list(range(8)))
    assert tree.used_bytes == 16
    keep(tree, list(range(12)), "kvz1")
    assert tree.used_bytes == 20
    assert tree.match(list(range(12)), "kvz1").num_tokens == 12
    assert tree.match(list(range(12)), "q8").num_tokens == 8


def test_a_block_that_could_not_be_saved_goes_with_what_continues_it():
    tree = tree_of()
    path = keep(tree, list(range(12)))
    keep(tree, [*range(4), 99])
    tree.discard(path[1])
    assert tree.match(list(range(12)), EXACT).num_tokens == 4
    assert tree.used_bytes == 5
    tree.discard(path[1])
    assert tree.used_bytes == 5


def test_what_does_not_fit_is_kept_in_part():
    tree = tree_of(10)
    assert [block.end_token for block in keep(tree, list(range(40)))] == [4, 8]
    assert tree.match(list(range(40)), EXACT).num_tokens == 8


class Bounded(RuleBasedStateMachine):
    """A small tree under pressure: never over its bytes, never an orphan, nothing pinned ever goes."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = tree_of(30)
        self.pinned: list[list[Block]] = []

    @rule(tokens=prompts, fidelity=fidelities)
    def extend(self, tokens, fidelity):
        path = self.tree.extend(tokens, fidelity)
        assert [token for block in path for token in block.tokens][: len(tokens)] == tokens[: _length(path)]
        self.pinned.append(path)

    @rule(tokens=prompts, fidelity=fidelities)
    def match(self, tokens, fidelity):
        blocks, _ = self.tree.match(tokens, fidelity)
        self.tree.pin(blocks)
        self.pinned.append(blocks)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data):
        self.tree.unpin(self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1))))

    @invariant()
    def bytes_add_up(self):
        blocks = list(walk(self.tree))
        assert self.tree.used_bytes == _length(blocks) <= 30

    @invariant()
    def pinned_blocks_stay(self):
        known = set(walk(self.tree))
        assert all(block in known for path in self.pinned for block in path)

    @invariant()
    def children_go_before_their_parents(self):
        order = list(self.tree._blocks)
        assert set(order) == set(walk(self.tree))
        place = {block: at for at, block in enumerate(order)}
        assert all(place[child] < place[block] for block in order for child in block.children.values())


TestBounded = Bounded.TestCase
TestBounded.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def walk(tree: PrefixTree) -> Iterator[Block]:
    waiting = [child for root in tree._roots.values() for child in root.children.values()]
    while waiting:
        block = waiting.pop()
        yield block
        waiting += block.children.values()


def _length(blocks: list[Block]) -> int:
    return sum(len(block.tokens) for block in blocks)


def hits(capacity: int, prompts: list[int]) -> tuple[float, float]:
    """Hit rate of the tree and of an LRU of the same size, in prompts of one block; -1 is a one-off."""
    tree, lru = tree_of(capacity * BLOCK), OrderedDict[tuple[int, ...], None]()
    ours = theirs = asked = one_offs = 0
    for number in prompts:
        one_offs += number < 0
        tokens = [number] * BLOCK if number >= 0 else [-one_offs] * BLOCK
        asked += number >= 0
        ours += tree.match(tokens, EXACT).num_tokens == BLOCK
        keep(tree, tokens)
        theirs += tuple(tokens) in lru
        lru[tuple(tokens)] = None
        lru.move_to_end(tuple(tokens))
        if len(lru) > capacity:
            lru.popitem(last=False)
    return ours / asked, theirs / asked


def test_a_scan_does_not_empty_it_and_without_one_it_is_no_worse_than_lru():
    rng = np.random.default_rng(0)
    zipf = [int(rank) for rank in rng.zipf(1.2, 6_000) if rank < 2_000]
    ours, lru = hits(60, zipf)
    assert ours >= lru
    # One-offs of five times the capacity after every 60 prompts, and the same mixed with the prompts.
    for every, one_offs in ((60, 300), (1, 5)):
        scanned = [n for at, one in enumerate(zipf[:2000]) for n in (one, *[-1] * (one_offs * (at % every == 0)))]
        ours, lru = hits(60, scanned)
        assert ours >= lru + 0.1


def test_it_says_why_blocks_went():
    tree = tree_of(3 * BLOCK)
    keep(tree, [1] * (BLOCK - 1))
    keep(tree, [1] * BLOCK)
    for number in range(2, 6):
        keep(tree, [number] * BLOCK)
    assert tree.losses.evicted == {"superseded": 1, "probation": 2}
    pinned = [tree.extend([number] * BLOCK, EXACT) for number in range(3, 6)]
    assert tree.extend([9] * BLOCK, EXACT) == []
    assert (tree.losses.refused, len(pinned)) == ({"busy": 1}, 3)
