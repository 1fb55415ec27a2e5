"""What ``isthmus measure proxy`` must show, figure by figure, and whether it did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from measurements.targets import Verdict

ADDED_TTFT_MS_P50, ADDED_TTFT_MS_P99 = 5.0, 15.0
THROUGHPUT, SPLIT_EFFICIENCY = 0.98, 0.95
# Gaps of streams beside a reader that stalls, and `auto`, over what they are compared with.
SLOW_READER, AUTO = 1.10, 1.10


def verdicts(summary: dict[str, Any]) -> Iterator[Verdict]:
    """Every figure of ``summary`` that has a target; those that were not measured are left out."""
    for engine, found in (("vLLM", summary), ("a fixed pace", summary.get("fixed_engine", {}))):
        if "throughput_vs_direct" in found:
            yield Verdict(f"added TTFT to {engine}, ms, p50", found["added_ttft_ms_p50"], "at most", ADDED_TTFT_MS_P50)
            yield Verdict(f"added TTFT to {engine}, ms, p99", found["added_ttft_ms_p99"], "at most", ADDED_TTFT_MS_P99)
            yield Verdict(f"throughput over {engine}", found["throughput_vs_direct"], "at least", THROUGHPUT)
    if idle := summary.get("idle_streams"):
        yield Verdict(f"errors of {idle['streams']} idle streams", idle["errors"], "at most", 0)
        slow = summary["slow_reader"]
        yield Verdict("errors beside a slow reader", slow["errors"], "at most", 0)
        yield Verdict("gaps beside a slow reader over alone, p99", slow["gap_p99_ratio"], "at most", SLOW_READER)
    if "split_efficiency" in summary:
        yield Verdict("split efficiency", summary["split_efficiency"], "at least", SPLIT_EFFICIENCY)
    for name, ratio in summary.get("auto_vs_best", {}).items():
        yield Verdict(f"auto over the best route, {name}", ratio, "at most", AUTO)
