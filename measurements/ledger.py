"""Where a proxy's time and bytes went, route by route, and what splitting has gained or lost so far."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from measurements import ledger_entries, ledger_spans, picture, result
from measurements.ledger_entries import Spent
from measurements.ledger_spans import WAITED

STAGES = (
    "queue",
    "tokenize",
    "route",
    "reserve",
    "prefill",
    "transfer_exposed",
    "first_decode",
    "decode",
    "gather",
    "encode",
    "d2h",
    "wire",
    "decode_frame",
    "inject",
)
_SECONDS = 1e9


def run(source: str, request_id: str | None, json: Path | None, plot: Path | None, trace: Path | None) -> None:
    """Sum up the ledger at ``source`` (URL or file); print tables, and write what is asked for.

    The picture has the waterfall of ``request_id``, or of the last request that was answered. Raises
    :class:`ConfigError` for a source that is no ledger and files that cannot be written, :class:`LinkError` for a proxy
    that does not answer.
    """
    entries = ledger_entries.read(source)
    one = ledger_entries.choose(entries, request_id)
    summary = summarize(entries)
    if json is not None:
        samples = [msgspec.to_builtins(entry) for entry in entries]
        result.write(json, "ledger", result.environment(), samples, summary)
    if trace is not None:
        ledger_spans.write_trace(trace, entries)
    if plot is not None:
        draw(one, summary, plot)
    console = Console()
    console.print(table(summary))
    console.print(waterfall_table(one))
    for line in sentences(summary):
        console.print(line)


def summarize(entries: Sequence[Spent]) -> dict[str, Any]:
    """Medians and 90th percentiles by way (route and codec) over answered requests, and totals.

    Requests that failed, were cancelled or went from one route to another are counted and left out of the medians.
    Shadows, which the proxy ran for its estimates and nobody waited for, count as such and nowhere else.
    """
    shadows = sum(entry.shadow_of is not None for entry in entries)
    entries = [entry for entry in entries if entry.shadow_of is None]
    by_way: dict[str, list[Spent]] = defaultdict(list)
    for entry in entries:
        by_way[entry.way].append(entry)
    gains_ns = [entry.specialization_gain_ns for entry in entries if entry.specialization_gain_ns is not None]
    return {
        "ways": {way: _way(found) for way, found in sorted(by_way.items())},
        "requests": len(entries),
        "shadows": shadows,
        "gained_s": sum(gain for gain in gains_ns if gain > 0) / _SECONDS,
        "lost_s": -sum(gain for gain in gains_ns if gain < 0) / _SECONDS,
        "net_gain_s": sum(gains_ns) / _SECONDS,
        "split_requests_with_gain": sum(gain > 0 for gain in gains_ns),
        "split_requests_with_loss": sum(gain < 0 for gain in gains_ns),
        "estimate_error": _estimate_error(entries),
        "prediction_error": {
            what: _errors([error for entry in entries if (error := getattr(entry, f"{what}_error")) is not None])
            for what in ("ttft", "e2e")
        },
        "regret": _regret(entries),
    }


def _way(entries: Sequence[Spent]) -> dict[str, Any]:
    counted = [entry for entry in entries if entry.status == "ok" and entry.failed_over is None]
    row: dict[str, Any] = {
        "requests": len(entries),
        "counted": len(counted),
        "failed_over": sum(entry.failed_over is not None for entry in entries),
        "not_ok": sum(entry.status != "ok" for entry in entries),
        "kv_raw_bytes": sum(entry.kv_raw_bytes for entry in entries),
        "kv_wire_bytes": sum(entry.kv_wire_bytes for entry in entries),
        "kv_reused_tokens": sum(entry.kv_reused_tokens for entry in entries),
    }
    if counted:
        for name in (*STAGES, "ttft", "total"):
            values = [value for entry in counted if (value := getattr(entry, f"{name}_ns")) is not None]
            if values:
                median, p90 = np.percentile(values, [50, 90])
                row[f"{name}_ns"] = {"p50": float(median), "p90": float(p90)}
    return row


def _estimate_error(entries: Sequence[Spent]) -> dict[str, Any] | None:
    """The estimate of the CPU's prefill against what it took where the request did run there; None if none did.

    Where cells were reused there was less to prefill than the estimate is for.
    """
    errors = [
        entry.prefill_alternative_ns / entry.prefill_ns - 1
        for entry in entries
        if entry.route == "cpu"
        and entry.status == "ok"
        and entry.failed_over is None
        and entry.kv_reused_tokens == 0
        and entry.prefill_alternative_ns
        and entry.prefill_ns
    ]
    return _errors(errors)


def _errors(errors: Sequence[float]) -> dict[str, Any] | None:
    if not errors:
        return None
    return {"median": float(np.median(errors)), "median_absolute": float(np.median(np.abs(errors))), "n": len(errors)}


def _regret(entries: Sequence[Spent]) -> dict[str, Any] | None:
    """What better routes would have saved, over requests that ran by another one too; None if none did."""
    known = [(entry.regret_ns, entry.total_ns) for entry in entries if entry.regret_ns is not None]
    if not known:
        return None
    lost_ns, took_ns = (sum(each) for each in zip(*known, strict=True))
    return {"total_s": lost_ns / _SECONDS, "share": lost_ns / max(took_ns, 1), "n": len(known)}


def sentences(summary: dict[str, Any]) -> list[str]:
    """Gain and the estimator's error for people."""
    lines = [
        f"splitting gained {summary['gained_s']:,.2f} s in {summary['split_requests_with_gain']} requests and lost"
        f" {summary['lost_s']:,.2f} s in {summary['split_requests_with_loss']}, against the CPU's own prefill as"
        f" estimated: {summary['net_gain_s']:+,.2f} s"
    ]
    if error := summary["estimate_error"]:
        lines.append(
            f"that estimate was off by {error['median']:+.0%} (median, {error['n']} requests that ran on route cpu)"
        )
    else:
        lines.append("nothing ran on route cpu, so nobody knows how good that estimate is")
    predicted = {what: error for what, error in summary["prediction_error"].items() if error}
    if predicted:
        offs = " and ".join(
            f"{what} by {error['median_absolute']:.0%} ({error['median']:+.0%})" for what, error in predicted.items()
        )
        lines.append(f"the router was off in {offs}: medians, {next(iter(predicted.values()))['n']} requests")
    if regret := summary["regret"]:
        lines.append(
            f"regret: another route would have saved {regret['total_s']:,.2f} s, {regret['share']:.1%} of the time of"
            f" {regret['n']} requests that ran by more than one"
        )
    return lines


def table(summary: dict[str, Any]) -> Table:
    """Medians by way for people, 90th percentiles behind them."""
    ways = {way: row for way, row in summary["ways"].items() if row["counted"]}
    made = Table(title="where the time went: median (90th percentile), ms", title_justify="left")
    made.add_column("stage")
    for way, row in ways.items():
        made.add_column(f"{way}\n{row['counted']} of {row['requests']}", justify="right")
    for name in (*STAGES, "ttft", "total"):
        if name == "gather" or name == "ttft":
            made.add_section()
        cells = [row.get(f"{name}_ns") for row in ways.values()]
        if any(cell and cell["p90"] for cell in cells):
            texts = [f"{cell['p50'] / 1e6:,.1f} ({cell['p90'] / 1e6:,.1f})" if cell else "" for cell in cells]
            made.add_row(name.replace("_", " "), *texts)
    made.add_section()
    made.add_row("KV raw, MiB", *(f"{row['kv_raw_bytes'] / 2**20:,.1f}" for row in ways.values()))
    made.add_row("KV wire, MiB", *(f"{row['kv_wire_bytes'] / 2**20:,.1f}" for row in ways.values()))
    return made


def waterfall_table(entry: Spent) -> Table:
    """One request's spans for people."""
    made = Table(title=f"request {entry.request_id}: {entry.way}, {entry.status}", title_justify="left")
    for column in ("", "stage", "from, ms", "took, ms"):
        made.add_column(column, justify="right" if "ms" in column else "left")
    last = None
    for span in ledger_spans.spans(entry):
        lane = "" if span.lane == last else span.lane
        made.add_row(lane, span.stage, f"{span.begin_ns / 1e6:,.1f}", f"{span.length_ns / 1e6:,.1f}")
        last = span.lane
    return made


def draw(entry: Spent, summary: dict[str, Any], path: Path) -> None:
    """The waterfall of ``entry`` beside every way's median stages; the format is by ``path``'s name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    one, many = figure.subplots(1, 2, width_ratios=(3, 2))
    found = list(ledger_spans.spans(entry))
    for row, span in enumerate(found):
        colour = "tab:blue" if span.lane == WAITED else "tab:grey"
        one.barh(row, span.length_ns / 1e6, left=span.begin_ns / 1e6, color=colour, height=0.7)
        one.annotate(f" {span.length_ns / 1e6:,.1f}", ((span.begin_ns + span.length_ns) / 1e6, row), va="center")
    one.set_yticks(range(len(found)), [span.stage.replace("_", " ") for span in found])
    one.invert_yaxis()
    one.margins(x=0.15)
    one.set(xlabel="ms (grey: at the same time, placed by its end)", title=f"one request, {entry.way}")
    waited = [stage for stage in STAGES[: STAGES.index("gather")] if stage != "first_decode"]
    ways = {way: row for way, row in summary["ways"].items() if row["counted"]}
    left = np.zeros(len(ways))
    for stage in waited:
        widths = np.array([row[f"{stage}_ns"]["p50"] / 1e6 for row in ways.values()])
        many.barh(list(ways), widths, left=left, label=stage.replace("_", " "), height=0.6)
        left += widths
    many.invert_yaxis()
    many.set(xlabel="ms, medians", title="what the client waits for, by way")
    many.legend(fontsize=7)
    picture.save(figure, path)
