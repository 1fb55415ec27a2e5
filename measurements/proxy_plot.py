"""The summary of ``measure proxy`` as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from measurements import picture
from measurements.proxy_summary import AUTO, FORCED


def draw(summary: dict[str, Any], path: Path) -> None:
    """End-to-end times by workload and route, `auto` among them with its regret; in the format of ``path``'s name."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    workloads = summary["workloads"]
    at = np.arange(len(workloads))
    for index, route in enumerate((*FORCED, AUTO)):
        times_s = [found["e2e_s"][route] for found in workloads.values()]
        bars = axes.bar(at + 0.2 * (index - 1.5), times_s, 0.18, label=route)
        if route == AUTO:
            regrets = [f"{(found['auto_vs_best'] - 1) * 100:+.0f}%" for found in workloads.values()]
            axes.bar_label(bars, regrets, padding=2, fontsize=8)
    axes.set_xticks(at, [name.replace(", ", "\n") for name in workloads], fontsize=8)
    title = (
        f"end to end by route; above auto: over the best one\n"
        f"proxy adds {summary['added_ttft_ms_p50']:.1f} ms to the first token (99th percentile"
        f" {summary['added_ttft_ms_p99']:.1f}), throughput {summary['throughput_vs_direct']:.2f} of direct,"
        f" split efficiency {summary['split_efficiency']:.2f}"
    )
    axes.set(ylabel="seconds, median", title=title)
    axes.legend()
    picture.save(figure, path)
