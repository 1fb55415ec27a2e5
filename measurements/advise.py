"""Would splitting pay on hardware that is described by numbers? Simulates it and says so, workload by workload."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from measurements import crossover_validation, picture, published, result
from measurements.profiles import Setup
from measurements.roofline import kv_bytes_per_token, kv_capacity_tokens, wire_seconds
from measurements.verdict import (
    NUMBERS,
    Gain,
    best_case,
    crossover,
    gain,
    options,
    outcome,
    sensitivity,
    sentence,
)
from measurements.workloads import WORKLOADS, Workload
from transfer.errors import ConfigError

CONCURRENCIES = (1, 2, 4, 8, 16, 32)
KV_TOKENS = (512, 2048, 8192, 32768)

Sample = dict[str, Any]


def run(setup: Setup, names: Sequence[str], json: Path | None, plot: Path | None) -> None:
    """Simulate ``setup`` under the workloads of these names, all if none; print verdicts, write and draw if told to.

    Raises :class:`ConfigError` for a workload that is unknown and files that cannot be written.
    """
    if plot is not None:
        # Fail before simulating, not after.
        import matplotlib as _  # noqa: F401
    workloads = choose(names)
    environment = result.environment()
    samples, summary = advise(setup, workloads, Console(stderr=True))
    if json is not None:
        result.write(json, "advise", environment, samples, summary)
    if plot is not None:
        draw(setup, samples, summary, plot)
    console = Console()
    for table in (kv_table(setup), verdict_table(summary), outcome_table(samples)):
        console.print(table)


def choose(names: Sequence[str]) -> list[Workload]:
    """The workloads of these names; :class:`ConfigError` naming those there are."""
    known = {workload.name: workload for workload in WORKLOADS}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"there is no workload {unknown[0]!r}; there are {', '.join(known)} - at --workload")
    return [known[name] for name in names] or list(WORKLOADS)


def advise(setup: Setup, workloads: Sequence[Workload], console: Console) -> tuple[list[Sample], dict[str, Any]]:
    """Samples by workload, option and concurrency, and the summary with verdicts and what would turn them."""
    samples: list[Sample] = []
    verdicts: dict[str, Any] = {}
    with Progress(console=console) as progress:
        per_workload = len(CONCURRENCIES) * len(options(setup))
        sweeping = progress.add_task("concurrency", total=len(workloads) * per_workload)
        changing = progress.add_task("sensitivity", total=len(workloads) * len(NUMBERS))
        for workload in workloads:
            gains: dict[int, Gain | None] = {}
            for concurrency in CONCURRENCIES:
                rows = {}
                for option in options(setup):
                    rows[option] = row = outcome(setup, option, workload, concurrency)
                    about = {"workload": workload.name, "option": option, "concurrency": concurrency}
                    samples.append(about | (row or {"no_room": True}))
                    progress.advance(sweeping)
                gains[concurrency] = gain(rows)
            verdict: dict[str, Any] = {
                "verdict": sentence(gains),
                "crossover_concurrency": crossover(gains),
                "gain": {str(each): found._asdict() if found else None for each, found in gains.items()},
                "sensitivity": [],
            }
            verdicts[workload.name] = verdict
            known = {concurrency: each for concurrency, each in gains.items() if each}
            if known:
                concurrency, best = best_case(known)
                flips = sensitivity(setup, workload, concurrency, best.pays, lambda: progress.advance(changing))
                verdict["sensitivity"] = list(flips)
    summary = {
        "setup": msgspec.to_builtins(setup),
        "workloads": verdicts,
        "kv": kv_sizes(setup),
        **published.summary(),
    }
    return samples, summary


def kv_sizes(setup: Setup) -> list[dict[str, Any]]:
    """How large KV of prompts is, and how long it takes over the link, by codec; ``tokens`` 0 is the room for it."""
    rows: list[dict[str, Any]] = []
    for tokens in KV_TOKENS:
        raw_bytes = tokens * kv_bytes_per_token(setup.model)
        row: dict[str, Any] = {"tokens": tokens, "raw_bytes": raw_bytes}
        for codec in setup.codecs:
            row[codec.name] = {
                "wire_bytes": raw_bytes * codec.bits_per_element / 16,
                "wire_s": wire_seconds(setup.link, codec, setup.model, tokens),
            }
        rows.append(row)
    return rows


def kv_table(setup: Setup) -> Table:
    """KV sizes for people."""
    room = ", ".join(
        f"{device.name} {device.nodes * kv_capacity_tokens(device, setup.model):,}" for device in (setup.gpu, setup.cpu)
    )
    title = f"KV of {setup.model.name} over {setup.link.name}; tokens there is room for: {room}"
    table = Table(title=title, title_justify="left")
    table.add_column("prompt", justify="right")
    table.add_column("raw", justify="right")
    for codec in setup.codecs:
        table.add_column(f"{codec.name} on the wire", justify="right")
    for row in kv_sizes(setup):
        cells = [
            f"{row[codec.name]['wire_bytes'] / 2**20:,.0f} MiB, {row[codec.name]['wire_s']:.2f} s"
            for codec in setup.codecs
        ]
        table.add_row(f"{row['tokens']:,}", f"{row['raw_bytes'] / 2**20:,.0f} MiB", *cells)
    return table


def verdict_table(summary: dict[str, Any]) -> Table:
    """Verdicts for people, with what would turn each."""
    error = (
        f"median error {summary['validation_error_median']:.0%} over {summary['validation_points']} published numbers"
    )
    table = Table(title=f"verdicts of a simulation ({error})", title_justify="left")
    for column in ("workload", "verdict", "turned by"):
        table.add_column(column)
    for name, verdict in summary["workloads"].items():
        flips = [f"{flip['number']} x{flip['factor']:.2g}" for flip in verdict["sensitivity"]]
        table.add_row(name, verdict["verdict"], "\n".join(flips) or "nothing by x2")
    return table


def outcome_table(samples: Sequence[Sample]) -> Table:
    """The curve for people: every option at 1, 8 and 32 requests."""
    table = Table(title="medians", title_justify="left")
    for column in ("workload", "requests", "option", "TTFT", "TPOT", "end to end", "tokens/s", "good answers/min"):
        table.add_column(column, justify="left" if column in ("workload", "option") else "right")
    last = None
    for sample in samples:
        if sample["concurrency"] not in (1, 8, 32):
            continue
        place = (sample["workload"], sample["concurrency"])
        if place != last:
            table.add_section()
        about = (sample["workload"], str(sample["concurrency"])) if place != last else ("", "")
        last = place
        if "no_room" in sample:
            table.add_row(*about, sample["option"], "no room")
            continue
        table.add_row(
            *about,
            sample["option"],
            f"{sample['ttft_s']['p50']:.2f} s",
            f"{sample['tpot_s']['p50'] * 1e3:.0f} ms",
            f"{sample['e2e_s']['p50']:.1f} s",
            f"{sample['tokens_per_s']:,.1f}",
            f"{sample['goodput_per_s'] * 60:,.1f}",
        )
    return table


def draw(setup: Setup, samples: Sequence[Sample], summary: dict[str, Any], path: Path) -> None:
    """Goodput and median end to end over concurrency, a column for each workload; the format is by ``path``'s name."""
    from matplotlib.figure import Figure

    names = list(summary["workloads"])
    figure = Figure(figsize=(3.4 * len(names), 6), layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        for option in options(setup):
            rows = [s for s in samples if (s["workload"], s["option"]) == (name, option) and "no_room" not in s]
            at = [row["concurrency"] for row in rows]
            style = {"marker": "o", "markersize": 3, "label": option, "linestyle": "--" if "split" in option else "-"}
            panels[0][column].plot(at, [row["goodput_per_s"] * 60 for row in rows], **style)
            panels[1][column].plot(at, [row["e2e_s"]["p50"] for row in rows], **style)
        panels[0][column].set(title=name, xscale="log")
        panels[1][column].set(xlabel="concurrent requests", xscale="log", yscale="log")
        for row in range(2):
            panels[row][column].set_xticks(CONCURRENCIES, list(map(str, CONCURRENCIES)), minor=False)
            panels[row][column].minorticks_off()
    panels[0][0].set_ylabel("answers a minute that keep the SLO")
    panels[1][0].set_ylabel("median end to end, s")
    panels[0][0].legend(fontsize=7)
    figure.suptitle(
        f"simulation: {setup.model.name} on {setup.gpu.name} and {setup.cpu.name} over {setup.link.name}", fontsize=11
    )
    picture.save(figure, path)


def validate_crossover(source: Path, json: Path | None) -> None:
    """Print the simulation's errors against a result of ``measure crossover``, and write them."""
    environment = result.environment()
    found = crossover_validation.from_result(source)
    if why := found.get("why"):
        raise ConfigError(f"{source}: {why}")
    if json is not None:
        summary = {key: found[key] for key in ("setup", "errors")} | published.summary()
        result.write(json, "advise", environment, found["points"], summary)
    Console().print(crossover_validation.table(found))


def validate(json: Path | None) -> None:
    """Print published numbers beside the simulation's, and write them; nothing else is simulated."""
    environment = result.environment()
    points = list(published.points())
    if json is not None:
        samples = [point._asdict() | {"error": point.error} for point in points]
        result.write(json, "advise", environment, samples, published.summary())
    table = Table(title="the simulation against published numbers", title_justify="left")
    for column in ("source", "what", "published", "simulated", "error", "note"):
        table.add_column(column, justify="left" if column in ("source", "what", "note") else "right")
    last = None
    for point in points:
        if point.source != last:
            table.add_section()
        error = f"{point.error:+.1%}" if point.counts else f"[dim]{point.error:+.1%}[/]"
        table.add_row(
            "" if point.source == last else point.source,
            point.what,
            f"{point.published:.4g} {point.unit}",
            f"{point.predicted:.4g} {point.unit}",
            error,
            f"[dim]{point.note}[/]",
        )
        last = point.source
    console = Console()
    console.print(table)
    found = published.summary()
    median, largest = found["validation_error_median"], found["validation_error_largest"]
    console.print(f"{found['validation_points']} numbers count: median error {median:.1%}, largest {largest:.1%}")
