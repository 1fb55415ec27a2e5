"""What ``isthmus measure decode`` must show, figure by figure, and whether it did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from measurements.targets import Verdict

# Of figures that are kept by number of sequences: each must reach its least, at these numbers or at all of them.
LEAST_RATES = {"vs_batched_bench": 0.97, "vs_llama_server": 1.0}
MOST_MEMORY = 0.05
_RATES: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    *((key, least, ()) for key, least in LEAST_RATES.items()),
    ("tuned_vs_llama_server_default", 1.3, ("8", "16")),
)
_AT_MOST = (
    ("itl_p99_handoff_ratio", 1.25),
    ("itl_p99_prefill_ratio", 2.0),
    ("handoff_to_logits_ms", 5.0),
    ("memory_overhead_fraction", MOST_MEMORY),
)
_AUTO_LEAST, _COPYING_LEAST = 0.97, 1.2


def verdicts(summary: dict[str, Any]) -> Iterator[Verdict]:
    """Every figure of ``summary`` that has a target; those that were not measured are left out."""
    for key, least, counts in _RATES:
        for count, value in summary[key].items():
            if not counts or count in counts:
                yield Verdict(f"{key}, {count} sequences", value, "at least", least)
    for key, most in _AT_MOST:
        yield Verdict(key, summary[key], "at most", most)
    speculation = summary.get("speculation", {})
    for name, ratio in speculation.items():
        yield Verdict(f"speculation auto over off, {name}", ratio, "at least", _AUTO_LEAST)
    if copying := [ratio for name, ratio in speculation.items() if "copied" in name]:
        yield Verdict("speculation auto over off, best on copied text", max(copying), "at least", _COPYING_LEAST)
