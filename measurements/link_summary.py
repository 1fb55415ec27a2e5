"""Samples of ``isthmus measure link`` become plain numbers, and a table.

A sample is of a ``part`` (``loopback``, ``path``, ``exposed``, ``frame``, ``memory``, ``inject``), a ``way`` and a
``round``. Ratios are taken within a round; of everything the median is reported, with both quartiles beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from cpu_decode.state import state_bytes
from measurements.link_synthetic import GEOMETRY
from transfer.config import Link

Sample = dict[str, Any]
Summary = dict[str, Any]

MEMCPY, IPERF3 = "memcpy", "iperf3"
# Into a process that is a bare ZeroMQ program; one that also copies each message; one that keeps its heap as the plane.
ZMQ, ZMQ_COPIED, ZMQ_KEPT = "bare ZeroMQ", "bare ZeroMQ, copied", "bare ZeroMQ, heap kept"
# What raw KV needs beside ZeroMQ, alone on one core: checksums at both ends and the copy to where it lands.
CHECKED = "checked and landed alone"
STAGES = ("encode", "seal", "wire", "open", "decode_frame")
CPU_SIDES = ("sender", "receiver")


def summarize(samples: Sequence[Sample], path: str) -> Summary:
    """The summary of whatever parts there are; ``path`` names the measured path in keys: ``shaped_10g`` or ``path``."""
    summary: Summary = {}
    if loopback := _of(samples, "loopback"):
        summary["loopback"] = _by_way(loopback)
        summary["loopback_raw_gb_per_s"] = summary["loopback"]["raw"]["gb_per_s"]["median"]
        summary["loopback_raw_vs_zmq"] = _ratio(loopback, "raw", ZMQ)
        summary["loopback_raw_vs_zmq_copied"] = _ratio(loopback, "raw", ZMQ_COPIED)
        summary["loopback_raw_vs_zmq_heap_kept"] = _ratio(loopback, "raw", ZMQ_KEPT)
        if any(s["way"] == CHECKED for s in loopback):
            # Of what bare ZeroMQ moves where processors are the limit.
            both = [sample for sample in loopback if sample["way"] in (CHECKED, ZMQ)]
            needed = _ratio(both, CHECKED, ZMQ, _cpu_s_per_gb)
            summary["loopback_raw_vs_zmq_bound"] = 1 / (1 + needed)
    if ways := _of(samples, "path"):
        summary[path] = _by_way(ways)
        if any(s["way"] == IPERF3 for s in ways):
            summary[f"{path}_zmq_vs_iperf3"] = _ratio(ways, ZMQ, IPERF3)
            summary[f"{path}_raw_vs_iperf3"] = _ratio(ways, "raw", IPERF3)
            summary[f"{path}_integrity_vs_iperf3"] = _ratio(ways, "raw integrity", IPERF3)
            summary[f"{path}_aes_gcm_vs_iperf3"] = _ratio(ways, "raw aes-gcm", IPERF3)
        summary[f"{path}_q8_vs_raw"] = _ratio(ways, "q8", "raw")
        summary["cpu_s_per_gb"] = {
            way: {side: row[f"{side}_cpu_s_per_gb"]["median"] for side in CPU_SIDES}
            for way, row in summary[path].items()
        }
    if exposed := _of(samples, "exposed"):
        summary |= _exposed(exposed, _of(samples, "frame"))
    if memory := _of(samples, "memory"):
        link = Link()
        summary["peak_landing_bytes"] = max(s["landing_bytes"] for s in memory)
        summary["peak_grown_bytes"] = max(s["grown_bytes"] for s in memory)
        summary["landing_limit_bytes"] = link.credit_chunks * state_bytes(GEOMETRY, link.chunk_tokens, "bf16")
    if inject := _of(samples, "inject"):
        summary |= _inject(inject)
    return summary


def _of(samples: Sequence[Sample], part: str) -> list[Sample]:
    return [sample for sample in samples if sample["part"] == part]


def _ways(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    ways: dict[str, list[Sample]] = {}
    for sample in samples:
        ways.setdefault(sample["way"], []).append(sample)
    return ways


def _rate(sample: Sample) -> float:
    """GB/s of 16-bit elements, whatever the codec made of them."""
    return float(sample["kv_bytes"] / sample["seconds"] / 1e9)


def _cpu_s_per_gb(sample: Sample) -> float:
    """CPU seconds of both processes for each GB of KV."""
    return float((sample["sender_cpu_s"] + sample["receiver_cpu_s"]) / sample["kv_bytes"] * 1e9)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = (float(value) for value in np.quantile(list(values), [0.25, 0.5, 0.75]))
    return {"median": median, "quartile_1": low, "quartile_3": high}


def _ratio(samples: Sequence[Sample], way: str, other: str, of: Callable[[Sample], float] = _rate) -> float:
    """Median over the rounds of ``way`` by ``other``."""
    by_round: dict[int, dict[str, float]] = {}
    for sample in samples:
        by_round.setdefault(sample["round"], {})[sample["way"]] = of(sample)
    return float(np.median([values[way] / values[other] for values in by_round.values()]))


def _by_way(samples: Sequence[Sample]) -> Summary:
    """By way: rate, CPU seconds for each GB of KV, and each stage's share of the time."""
    rows: Summary = {}
    for way, own in _ways(samples).items():
        row = rows[way] = {"gb_per_s": spread(map(_rate, own))}
        for side in CPU_SIDES:
            if f"{side}_cpu_s" in own[0]:
                row[f"{side}_cpu_s_per_gb"] = spread(s[f"{side}_cpu_s"] / s["kv_bytes"] * 1e9 for s in own)
        for stage in STAGES:
            if f"{stage}_s" in own[0]:
                row[f"{stage}_s_per_gb"] = spread(s[f"{stage}_s"] / s["kv_bytes"] * 1e9 for s in own)
    return rows


def _exposed(samples: Sequence[Sample], frames: Sequence[Sample]) -> Summary:
    ways, lone = _ways(samples), _ways(frames)
    summary: Summary = {"exposed": {}}
    for way, own in ways.items():
        key = way.replace("raw serial", "serial").replace(" ", "_").replace("-", "_")
        summary["exposed"][way] = {"ms": spread(1e3 * s["seconds"] for s in own), "prefill_s": own[0]["prefill_s"]}
        summary[f"exposed_{key}_fraction"] = float(np.median([s["fraction"] for s in own]))
        if frame := lone.get(way.removesuffix(" late")):
            summary["exposed"][way]["frame_ms"] = spread(1e3 * s["seconds"] for s in frame)
            both = [*own, *({**s, "way": "one frame"} for s in frame)]
            summary[f"exposed_{key}_frames"] = _ratio(both, way, "one frame", lambda s: float(s["seconds"]))
    return summary


def _inject(samples: Sequence[Sample]) -> Summary:
    ways = _ways(samples)
    stalls = [1e3 * s["seconds"] for s in ways["stall"]]
    rounds = sorted({s["round"] for s in ways["inject"]})
    medians = {
        way: [float(np.median([_rate(s) for s in ways[way] if s["round"] == turn])) for turn in rounds]
        for way in ("inject", MEMCPY)
    }
    return {
        "inject": {way: {"gb_per_s": spread(map(_rate, ways[way]))} for way in ("inject", MEMCPY)},
        "inject_vs_memcpy": float(np.median(np.divide(medians["inject"], medians[MEMCPY]))),
        "inject_stall_ms": float(np.median(stalls)),
        "inject_stall_p99_ms": float(np.quantile(stalls, 0.99)),
        "inject_chunk_tokens": ways["stall"][0]["chunk_tokens"],
    }


def tables(summary: Summary) -> list[Table]:
    """The summary for a terminal."""
    shown = [_rates(summary[part], part) for part in ("loopback", "shaped_10g", "path") if part in summary]
    plain = {key: value for key, value in summary.items() if not isinstance(value, dict)}
    numbers = Table(title="in short", title_justify="left", show_header=False)
    for key, value in plain.items():
        numbers.add_row(key, f"{value:,}" if isinstance(value, int) else f"{value:.3f}")
    for way, row in summary.get("exposed", {}).items():
        numbers.add_row(f"exposed, {way}", _text(row["ms"], "ms"))
    return [*shown, numbers]


def _rates(rows: Summary, part: str) -> Table:
    shown = Table(
        title=f"{part}: GB/s of 16-bit KV, median (quartiles); seconds a GB: CPU of both processes, stages",
        title_justify="left",
    )
    shown.add_column("way")
    for column in ("GB/s", "tx", "rx", "enc", "seal", "open", "dec"):
        shown.add_column(column, justify="right", no_wrap=True)
    keys = ("sender_cpu", "receiver_cpu", "encode", "seal", "open", "decode_frame")
    for way, row in rows.items():
        seconds = [row.get(f"{key}_s_per_gb") for key in keys]
        shown.add_row(way, _text(row["gb_per_s"]), *(f"{value['median']:.2f}" if value else "" for value in seconds))
    return shown


def _text(values: dict[str, float], unit: str = "") -> str:
    return f"{values['median']:.2f} {unit} ({values['quartile_1']:.2f} to {values['quartile_3']:.2f})".replace(
        "  ", " "
    )
