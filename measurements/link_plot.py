"""The picture of ``isthmus measure link``: a panel for each part that was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from measurements import picture
from measurements.link_summary import CHECKED, IPERF3, MEMCPY

Summary = dict[str, Any]
TITLES = {
    "loopback": "loopback, blocks to landing buffers",
    "shaped_10g": "veth shaped to 10 Gbit/s, MTU 9000",
    "path": "between the two hosts",
}


def draw(summary: Summary, path: Path) -> None:
    """Medians with quartiles, in the format of ``path``'s name."""
    from matplotlib.figure import Figure

    parts = [part for part in ("loopback", "shaped_10g", "path", "exposed", "inject") if part in summary]
    figure = Figure(figsize=(5 * len(parts), 4.5), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        if part == "exposed":
            _exposed(axes, summary["exposed"])
        elif part == "inject":
            _bars(axes, {way: row["gb_per_s"] for way, row in summary["inject"].items()})
            stall = f"{summary['inject_stall_ms']:.1f} ms a chunk of {summary['inject_chunk_tokens']} tokens"
            axes.set(ylabel="GB/s", title=f"into f16 cells: {stall}")
        else:
            # What one core does alone would dwarf the others.
            moved = {way: row["gb_per_s"] for way, row in summary[part].items() if way not in (MEMCPY, CHECKED)}
            _bars(axes, moved)
            axes.set(ylabel="GB/s of 16-bit KV", title=TITLES[part])
            if IPERF3 in summary[part]:
                axes.axhline(summary[part][IPERF3]["gb_per_s"]["median"], color="grey", linestyle="--")
    picture.save(figure, path)


def _bars(axes: Any, rows: dict[str, dict[str, float]], scale: float = 1.0) -> None:
    middle = scale * np.array([row["median"] for row in rows.values()])
    low = scale * np.array([row["quartile_1"] for row in rows.values()])
    high = scale * np.array([row["quartile_3"] for row in rows.values()])
    axes.bar(range(len(rows)), middle, yerr=[middle - low, high - middle], capsize=3)
    axes.set_xticks(range(len(rows)), list(rows), rotation=35, ha="right")


def _exposed(axes: Any, rows: Summary) -> None:
    """Time after the prefill in percent of it; above each bar in ms."""
    for at, row in enumerate(rows.values()):
        percent = row["ms"]["median"] / row["prefill_s"] / 10
        axes.bar(at, percent, color="C0")
        axes.annotate(f"{row['ms']['median']:.1f} ms", (at, percent), ha="center", va="bottom")
    axes.axhline(3, color="grey", linestyle="--", label="3%")
    axes.set_xticks(range(len(rows)), list(rows), rotation=35, ha="right")
    axes.margins(y=0.2)
    axes.set(yscale="log", ylabel="% of the prefill's time", title="exposed after the prefill")
    axes.legend()
