"""The simulation of evictions, and what a result is summed up to."""

from __future__ import annotations

from collections import Counter

from measurements import pool, pool_kills, pool_targets, targets
from measurements.pool_eviction import CAPACITY_BLOCKS, SCAN_CAPACITIES, STRETCH, hit_rates, with_scans, zipf


def test_the_tree_keeps_what_is_popular_through_scans():
    prompts = zipf(1.0, 4_000, seed=1)
    ours, lru = hit_rates(prompts)
    assert ours >= lru > 0.3
    scanned = with_scans(prompts)
    assert len(scanned) == 1000 + 1000 // STRETCH * SCAN_CAPACITIES * CAPACITY_BLOCKS
    ours, lru = hit_rates(scanned)
    assert ours >= lru + 0.1


def test_a_summary_has_shares_totals_and_tables():
    samples = [
        {"part": "ttft", "tier": tier, "round": 0, "ttft_s": seconds, "reused_tokens": 4032}
        for tier, seconds in (("cold", 4.0), ("cells", 0.1), ("ram", 0.2), ("disk", 0.4), ("shared", 0.8))
    ]
    samples += [{"part": "answer", "tier": "ram", "reused_tokens": 512, "same": same} for same in (True, False)]
    samples += [
        pool._sent(part, 0, {"prompt_tokens": 100, "kv_reused_tokens": 60, "kv_wire_bytes": 4000})
        for part in ("conversation", "session", "session")
    ]
    samples += [{"part": "stored", "tier": tier, "blocks": 63} for tier in ("ram", "disk", "shared")]
    samples += [{"part": "eviction", "exponent": 1.0, "scan": True, "tree": 0.6, "lru": 0.4}]
    summary = pool.summarize(samples)
    assert summary["share_of_cold"] == {"cells": 0.025, "ram": 0.05, "disk": 0.1, "shared": 0.2}
    assert (summary["same_answers"], summary["answers"]) == (1, 2)
    assert summary["conversation"] == {
        "requests": 1,
        "prompt_tokens": 100,
        "reused_tokens": 60,
        "new_tokens": 40,
        "wire_bytes": 4000,
        "unpooled_bytes": 10_000,
    }
    assert summary["sessions"]["wire_bytes"] == 8000
    assert summary["sessions"]["stored_blocks"]["disk"] == 63
    assert summary["sessions"]["stored_times"] == {"ram": 59 / 31, "disk": 61 / 31, "shared": 61 / 31}
    missed = [each.figure for each in pool_targets.verdicts(summary) if not each.passed]
    assert missed == [
        "answers as the cold ones",
        *(f"times that the shared prompt is stored in {tier}" for tier in ("ram", "disk", "shared")),
    ]
    assert "miss" in [*targets.table([*pool_targets.verdicts(summary)]).columns[3].cells]
    assert [table.row_count for table in pool.tables(summary)] == [5, 2, 1]


def test_a_picture_is_drawn(tmp_path):
    samples = [
        {"part": "ttft", "tier": tier, "round": 0, "ttft_s": 1.0, "reused_tokens": 0}
        for tier in ("cold", "cells", "ram", "disk", "shared")
    ]
    samples += [
        pool._sent("conversation", turn, {"prompt_tokens": 100, "kv_reused_tokens": 60, "kv_wire_bytes": 4000})
        for turn in range(2)
    ]
    samples += [{"part": "eviction", "exponent": 1.0, "scan": False, "tree": 0.6, "lru": 0.4}]
    pool.draw(pool.summarize(samples), samples, tmp_path / "pool.png")
    assert (tmp_path / "pool.png").stat().st_size > 10_000


def test_kills_pass_only_where_every_text_is_right_and_nothing_is_corrupt():
    sample = {
        "status": "ok",
        "error": "",
        "same": True,
        "failed_over": "link_error",
        "prompt_tokens": 300,
        "reused_tokens": 256,
        "gap_s": 0.5,
    }
    losses = Counter(torn=2)
    summary = pool_kills.summarize([sample, sample], losses, 30, 0)
    assert (summary["pass"], summary["right_texts"], summary["torn_writes"]) == (True, 2, 2)
    assert summary["resumed_with_blocks"] == 2
    wrong = pool_kills.summarize([sample, sample | {"same": False}], losses, 30, 0)
    ended = pool_kills.summarize([sample | {"error": "an answer ended early"}], losses, 30, 0)
    corrupt = pool_kills.summarize([sample], losses, 30, 1)
    empty = pool_kills.summarize([sample], losses, 0, 0)
    assert not any(each["pass"] for each in (wrong, ended, corrupt, empty))
    assert "NO" in [*pool_kills.table(wrong).columns[1].cells]
    assert "WRONG TEXT" in pool_kills.told(sample | {"same": False})


def test_growth_is_that_of_the_worst_turn():
    def turn(prompt_tokens: int, new_tokens: int) -> pool.Sample:
        return {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "wire_bytes": 1000 * new_tokens}

    assert pool_targets.growth([turn(100, 100), turn(180, 40), turn(260, 80)]) == {"tokens": 1.0, "bytes": 1.0}
    assert pool_targets.growth([turn(100, 100), turn(180, 180), turn(260, 40)])["tokens"] == 180 / 80
