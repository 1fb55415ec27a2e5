"""What the samples of ``measure proxy`` come to: ratios and differences within a round, and their medians."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Sample = dict[str, Any]

DIRECT, PROXIED = "direct", "proxied"
FORCED = ("split", "gpu", "cpu")
AUTO = "auto"


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """All of it; what was not measured is left out."""
    summary: dict[str, Any] = {}
    parts = {sample["part"] for sample in samples}
    engines = {sample.get("engine") for sample in samples}
    if "vllm" in engines:
        summary |= _overhead(_of(samples, engine="vllm"))
    if "fixed" in engines:
        summary["fixed_engine"] = _overhead(_of(samples, engine="fixed"))
    if "idle" in parts:
        summary["idle_streams"] = _idle(_of(samples, part="idle"))
        summary["slow_reader"] = _slow_reader(_of(samples, part="slow reader"))
    if "split" in parts:
        summary |= _split(_of(samples, part="split"))
    if "workload" in parts:
        workloads = dict.fromkeys(sample["workload"] for sample in _of(samples, part="workload"))
        summary["workloads"] = {name: _workload(_of(samples, workload=name)) for name in workloads}
        summary["auto_vs_best"] = {name: found["auto_vs_best"] for name, found in summary["workloads"].items()}
    return summary


def _overhead(samples: Sequence[Sample]) -> dict[str, Any]:
    """What the proxy adds to the time to first token, and what it leaves of the throughput.

    The median's difference is taken within a round; the 99th percentile needs all rounds' requests.
    """
    ttft_s = _by_way(_of(samples, part="ttft"), "ttft_s")
    rates = _by_way(_of(samples, part="throughput"), "tokens_per_s")
    rounds = sorted(ttft_s[DIRECT])
    added_s = [statistics.median(ttft_s[PROXIED][turn]) - statistics.median(ttft_s[DIRECT][turn]) for turn in rounds]
    ratios = [rates[PROXIED][turn] / rates[DIRECT][turn] for turn in rounds]
    pooled = {way: [each for turn in rounds for each in ttft_s[way][turn]] for way in (DIRECT, PROXIED)}
    p99_s = {way: float(np.percentile(values, 99)) for way, values in pooled.items()}
    return {
        "added_ttft_ms_p50": statistics.median(added_s) * 1e3,
        "added_ttft_ms_p50_spread": [min(added_s) * 1e3, max(added_s) * 1e3],
        "added_ttft_ms_p99": (p99_s[PROXIED] - p99_s[DIRECT]) * 1e3,
        "direct_ttft_ms_p50": statistics.median(pooled[DIRECT]) * 1e3,
        "direct_ttft_ms_p99": p99_s[DIRECT] * 1e3,
        "throughput_vs_direct": statistics.median(ratios),
        "throughput_vs_direct_spread": [min(ratios), max(ratios)],
        "direct_tokens_per_s": statistics.median(rates[DIRECT].values()),
    }


def _idle(samples: Sequence[Sample]) -> dict[str, Any]:
    late_ms = [each for sample in samples for each in sample["late_ms"]]
    return {
        "streams": max(sample["streams"] for sample in samples),
        "errors": sum(sample["errors"] for sample in samples),
        "late_ms_p50": statistics.median(late_ms),
        "late_ms_p99": float(np.percentile(late_ms, 99)),
        "late_ms_max": max(late_ms),
    }


def _slow_reader(samples: Sequence[Sample]) -> dict[str, Any]:
    """99th percentiles of other streams' gaps, beside one that does not read and without it; the ratio by round."""
    p99_ms = {
        beside: {s["round"]: float(np.percentile(s["gaps_ms"], 99)) for s in samples if s["beside"] is beside}
        for beside in (True, False)
    }
    return {
        "gap_ms_p99": statistics.median(p99_ms[True].values()),
        "gap_ms_p99_alone": statistics.median(p99_ms[False].values()),
        "gap_p99_ratio": statistics.median(p99_ms[True][turn] / p99_ms[False][turn] for turn in p99_ms[True]),
        "errors": sum(sample["errors"] for sample in samples),
    }


def _split(samples: Sequence[Sample]) -> dict[str, Any]:
    ratios = [(sample["prefill_s"] + sample["decode_s"]) / sample["e2e_s"] for sample in samples]
    return {
        "split_efficiency": statistics.median(ratios),
        "split_efficiency_spread": [min(ratios), max(ratios)],
        **{name: statistics.median(sample[name] for sample in samples) for name in ("prefill_s", "decode_s", "e2e_s")},
    }


def _workload(samples: Sequence[Sample]) -> dict[str, Any]:
    """Median end-to-end time by route, and how much longer `auto` takes than the route that is best overall."""
    e2e_s = {
        route: {s["round"]: statistics.median(s["e2e_s"]) for s in samples if s["route"] == route}
        for route in (*FORCED, AUTO)
    }
    medians = {route: statistics.median(rounds.values()) for route, rounds in e2e_s.items()}
    best = min(FORCED, key=lambda route: medians[route])
    ratios = [e2e_s[AUTO][turn] / e2e_s[best][turn] for turn in e2e_s[AUTO]]
    taken = Counter(route for sample in samples if sample["route"] == AUTO for route in sample["taken"])
    return {
        "e2e_s": medians,
        "best": best,
        "auto_vs_best": statistics.median(ratios),
        "auto_vs_best_spread": [min(ratios), max(ratios)],
        "auto_took": dict(taken.most_common()),
    }


def _of(samples: Iterable[Sample], **fields: str) -> list[Sample]:
    return [sample for sample in samples if all(sample.get(key) == value for key, value in fields.items())]


def _by_way(samples: Sequence[Sample], field: str) -> dict[str, dict[int, Any]]:
    return {way: {s["round"]: s[field] for s in samples if s["way"] == way} for way in (DIRECT, PROXIED)}
