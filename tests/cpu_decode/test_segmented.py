"""Sizes add up, and what was used twice outlives what was used once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_decode.segmented import PROTECTED_SHARE, SegmentedLru

steps = st.lists(st.tuples(st.sampled_from(["add", "use", "renew", "remove"]), st.integers(0, 9)), max_size=60)


@given(steps)
@settings(max_examples=60)
def test_sizes_add_up_whatever_is_done(steps):
    lru, known = SegmentedLru[int](50), {}
    for what, item in steps:
        if what == "add" and item not in known:
            lru.add(item, item + 1)
            known[item] = item + 1
        elif what == "remove":
            assert lru.remove(item) == known.pop(item, 0)
        elif what != "add" and item in known:
            getattr(lru, what)([item])
        assert lru.used_bytes == sum(known.values())
        assert sorted(lru) == sorted(known)
        assert (len(lru), all(item in lru for item in known)) == (len(known), True)
        assert lru._protected_bytes == sum(lru._protected.values()) <= PROTECTED_SHARE * 50


def test_what_goes_first_is_what_was_used_once_and_longest_ago():
    lru = SegmentedLru[str](100)
    for item in "abcd":
        lru.add(item, 10)
    lru.use("a")
    lru.renew("b")
    assert list(lru) == ["c", "d", "b", "a"]
