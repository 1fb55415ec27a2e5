"""The picture of ``isthmus measure decode``: throughput, gaps between tokens, roofline, memory, guessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from measurements import picture
from measurements.decode import RATIOS


def draw(summary: dict[str, Any], path: Path) -> None:
    """Six panels in the format of ``path``'s name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    rates, ratios, gaps, roofline, memory, guessing = figure.subplots(2, 3).flat
    for way, by_count in summary["tokens_per_s"].items():
        rates.plot([int(n) for n in by_count], list(by_count.values()), marker="o", label=way)
    rates.set(xlabel="sequences", ylabel="tokens/s", title="decode throughput, medians", ylim=(0, None))
    rates.legend()

    for key in RATIOS:
        at, bounds = [int(n) for n in summary[key]], zip(*summary["quartiles"][key].values(), strict=True)
        ratios.plot(at, list(summary[key].values()), marker="o", label=key)
        ratios.fill_between(at, *bounds, alpha=0.15)
    ratios.axhline(1, color="grey", linestyle="--")
    ratios.set(xlabel="sequences", title="ours over theirs, medians of neighbours; middle half shaded")
    ratios.legend()
    counts = list(summary["bandwidth_vs_stream_by_sequences"])
    for axes in (rates, ratios):
        axes.set_xscale("log", base=2)
        axes.set_xticks([int(n) for n in counts], counts)

    gaps.bar(list(summary["itl_p99_ms"]), list(summary["itl_p99_ms"].values()))
    gaps.set(ylabel="ms", title="p99 gap between tokens")
    gaps.tick_params(axis="x", labelrotation=20)

    achieved = summary["bandwidth_vs_stream_by_sequences"]
    reads = summary["read_gb_per_s"]
    roofline.bar(list(achieved), [share * reads for share in achieved.values()])
    roofline.axhline(reads, color="black", linestyle="--", label="reading, measured")
    roofline.axhline(summary["stream_triad_gb_per_s"], color="grey", linestyle=":", label="STREAM triad, measured")
    roofline.set(xlabel="sequences", ylabel="GB/s of weights and cells", title="roofline: what each step must read")
    roofline.legend()

    parts = summary["memory_bytes"]
    memory.bar(list(parts), [size / 2**20 for size in parts.values()])
    memory.set(ylabel="MiB", title="resident memory of the worker")

    speculation = summary["speculation"]
    guessing.barh(list(speculation), list(speculation.values()))
    guessing.axvline(1, color="grey", linestyle="--")
    guessing.set(xlabel="tokens/s, auto over off", title="guessing from the text so far")
    guessing.invert_yaxis()
    picture.save(figure, path)
