"""The picture of a crossover: throughput, time to first token, and what splitting has over the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from measurements import picture
from measurements.verdict import WORTH


def draw(summary: dict[str, Any], path: Path) -> None:
    """A column for each workload and one for prompt length; the format is by ``path``'s name."""
    from matplotlib.figure import Figure

    workloads = summary["workloads"]
    sweep = summary.get("prompt_length")
    columns = len(workloads) + bool(sweep)
    figure = Figure(figsize=(3.2 * max(columns, 2), 8), layout="constrained")
    panels = figure.subplots(3, columns, squeeze=False)
    for column, (name, made) in enumerate(workloads.items()):
        shape = made["workload"]
        title = f"{name}\n{shape['prompt_tokens']} in, {shape['output_tokens']} out: {made['verdict']}"
        _column(panels[:, column], made["options"], made["gain"], title, "concurrent requests")
    if sweep:
        options: dict[str, dict[str, Any]] = {}
        for tokens, rows in sweep["options"].items():
            for option, row in rows.items():
                options.setdefault(option, {})[tokens] = row["1"]
        title = f"one request\nby length of its prompt: {sweep['verdict']}"
        _column(panels[:, -1], options, sweep["gain"], title, "prompt tokens")
    for row, label in enumerate(("output tokens/s", "median TTFT, ms", "best split / best other")):
        panels[row][0].set_ylabel(label)
    panels[0][0].legend(fontsize=7)
    picture.save(figure, path)


def _column(panels: Any, options: dict[str, dict[str, Any]], gain: dict[str, Any], title: str, x_label: str) -> None:
    ticks = sorted({int(at) for rows in options.values() for at in rows})
    for option, rows in options.items():
        at = [int(each) for each in rows]
        style = {
            "marker": "o",
            "markersize": 3,
            "label": option,
            "color": picture.COLOURS.get(option, "grey"),
            "linestyle": "--" if option.startswith("split") else ":" if option == "auto" else "-",
        }
        rates = [row["tokens_per_s"] for row in rows.values()]
        low = [rate - row["tokens_per_s_interval"][0] for rate, row in zip(rates, rows.values(), strict=True)]
        high = [row["tokens_per_s_interval"][1] - rate for rate, row in zip(rates, rows.values(), strict=True)]
        errors = [[max(each, 0.0) for each in side] for side in (low, high)]
        panels[0].errorbar(at, rates, yerr=errors, capsize=2, elinewidth=0.7, **style)
        panels[1].plot(at, [row["ttft_s"]["p50"] * 1e3 for row in rows.values()], **style)
    at = [int(each) for each in gain]
    ratios = [each["ratio"] for each in gain.values()]
    bounds = [
        [max(ratio - each["low"], 0.0) for ratio, each in zip(ratios, gain.values(), strict=True)],
        [max(each["high"] - ratio, 0.0) for ratio, each in zip(ratios, gain.values(), strict=True)],
    ]
    panels[2].errorbar(at, ratios, yerr=bounds, capsize=2, color="tab:red", marker="o", markersize=3)
    panels[2].axhline(1.0, color="grey")
    panels[2].axhspan(1 / WORTH, WORTH, color="grey", alpha=0.2)
    panels[0].set(title=title)
    panels[1].set(yscale="log")
    panels[2].set(xlabel=x_label)
    for panel in panels:
        panel.set_xscale("log")
        panel.set_xticks(ticks, list(map(str, ticks)))
        panel.set_xticks([], minor=True)
