"""Whoever asks now and then has the same picture as whoever asks for everything."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_decode.pool import block_log
from cpu_decode.pool.block_log import TIERS, BlockLog
from proxy.block_index import BlockIndex

NAMES = [hashlib.blake2b(bytes([n]), digest_size=32).digest() for n in range(6)]
said = st.tuples(st.sampled_from(["add", "remove", "ask"]), st.sampled_from(TIERS), st.sampled_from(NAMES))


@given(st.lists(said, max_size=60))
@settings(max_examples=80)
def test_a_copy_that_is_brought_up_to_date_equals_a_new_one(steps):
    log, copy = BlockLog(), BlockIndex()
    held: set[tuple[str, bytes]] = set()
    for what, tier, name in steps:
        if what == "add" and (tier, name) not in held:
            log.add(tier, [name])
            held.add((tier, name))
        elif what == "remove" and (tier, name) in held:
            log.remove(tier, [name])
            held.discard((tier, name))
        elif what == "ask":
            copy.take(log.since(copy.version))
            if copy.version != log.version:
                copy.take(log.since(copy.version))
            for each in NAMES:
                best = next((tier for tier in TIERS if (tier, each) in held), None)
                assert copy.tier(each) == best


def test_several_sequences_may_hold_a_block_in_cells():
    log = BlockLog()
    log.add("cells", [NAMES[0]])
    log.add("cells", [NAMES[0]])
    log.remove("cells", [NAMES[0]])
    assert log.since(0).added == {"cells": [NAMES[0][:8]]}
    log.remove("cells", [NAMES[0]])
    assert log.since(0).added == {}


def test_who_was_away_for_long_gets_everything(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(block_log, "MAX_CHANGES", 4)
    log, copy = BlockLog(), BlockIndex()
    log.add("ram", NAMES[:1])
    copy.take(log.since(copy.version))
    log.add("ram", NAMES[1:3])
    assert log.since(copy.version).base_version == copy.version
    log.add("ram", NAMES[3:])
    log.remove("ram", NAMES[:2])
    update = log.since(copy.version)
    assert update.base_version == 0
    copy.take(update)
    assert [copy.tier(name) for name in NAMES] == [None, None, "ram", "ram", "ram", "ram"]


def test_an_update_of_another_copy_is_left_out_and_asked_for_again():
    log, copy = BlockLog(), BlockIndex()
    log.add("ram", NAMES[:2])
    copy.take(log.since(0))
    log.add("disk", NAMES[2:])
    late = log.since(copy.version)
    copy.clear()
    copy.take(late)
    assert (copy.version, len(copy)) == (0, 0)
    copy.take(log.since(copy.version))
    assert len(copy) == len(NAMES)


def test_a_full_update_stays_below_its_limit_and_keeps_the_best(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(block_log, "MAX_BLOCKS", 2)
    log = BlockLog()
    log.add("shared", NAMES[:3])
    log.add("ram", NAMES[3:4])
    added = log.since(0).added
    assert added["ram"] == [NAMES[3][:8]]
    assert len(added["shared"]) == 1
