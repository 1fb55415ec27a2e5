"""What ``isthmus measure pool`` must show, figure by figure, and whether it did."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from measurements.targets import Verdict

# Of the cold TTFT, by tier.
LIMITS = {"cells": 0.05, "ram": 0.10, "disk": 0.25}
_LEAST_GAIN_WITH_SCANS = 0.10


def verdicts(summary: dict[str, Any]) -> Iterator[Verdict]:
    """Every figure of ``summary`` that has a target."""
    for tier, limit in LIMITS.items():
        yield Verdict(f"TTFT from {tier} over cold", summary["share_of_cold"][tier], "at most", limit)
    yield Verdict("answers as the cold ones", summary["same_answers"] / summary["answers"], "at least", 1.0)
    growth = summary["conversation_growth"]
    yield Verdict("worst turn: tokens computed over tokens that are new", growth["tokens"], "at most", 1.0)
    yield Verdict("worst turn: bytes sent over bytes of what is new", growth["bytes"], "at most", 1.0)
    sessions = summary["sessions"]
    for tier, times in sessions["stored_times"].items():
        yield Verdict(f"times that the shared prompt is stored in {tier}", times, "at most", 1.0)
    yield Verdict("times that the shared prompt is sent", sessions["sent_times"], "at most", 1.0)
    for scan, least in ((False, 0.0), (True, _LEAST_GAIN_WITH_SCANS)):
        gains = [row["tree"] - row["lru"] for row in summary["eviction"] if row["scan"] == scan]
        if gains:
            name = "with scans" if scan else "without scans"
            yield Verdict(f"least gain in hit rate over LRU, {name}", min(gains), "at least", least)


def growth(turns: list[dict[str, Any]]) -> dict[str, float]:
    """The worst turn of a conversation behind the first: what was computed and sent, over what had been said since.

    What is new of a turn is the answer before it, which need not be computed again, and the question. ``turns`` are
    samples in order, with ``prompt_tokens``, ``new_tokens`` and ``wire_bytes``.
    """
    token_bytes = turns[0]["wire_bytes"] / turns[0]["new_tokens"]
    tokens, sent = [], []
    for before, turn in pairwise(turns):
        new_tokens = max(turn["prompt_tokens"] - before["prompt_tokens"], 1)
        tokens.append(turn["new_tokens"] / new_tokens)
        sent.append(turn["wire_bytes"] / (new_tokens * token_bytes))
    return {"tokens": max(tokens, default=0.0), "bytes": max(sent, default=0.0)}
