"""What ``isthmus top`` shows: tables made of what the proxy said, and nothing that a name could smuggle in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from isthmus.ledger_table import mebibytes, milliseconds

Entry = dict[str, Any]

BAR_CELLS = 36
# What the client waits for, one after another, with the colours of the bars.
STAGES = {
    "queue": "bright_black",
    "tokenize": "blue",
    "route": "blue",
    "reserve": "cyan",
    "prefill": "magenta",
    "transfer_exposed": "bright_red",
    "decode": "green",
}
# Lines that are no requests: heading, legend, table heads and rules.
OTHER_LINES = 16
FEWEST_REQUESTS = 3


def screen(
    url: str, lost: str | None, nodes: dict[str, Any] | None, entries: Sequence[Entry], height: int
) -> RenderableType:
    """Everything, in about ``height`` lines; ``lost`` says why the proxy is not heard now."""
    totals = _totals(entries)
    workers = len(nodes["workers"]) if nodes else 0
    room = max(FEWEST_REQUESTS, height - OTHER_LINES - workers - totals.row_count)
    state = Text("live", "bold green") if lost is None else Text(f"not heard: {plain(lost)}", "bold red")
    heading = Text.assemble(("isthmus top  ", "bold"), plain(url), "  ", state)
    return Group(heading, _nodes(nodes), _requests(entries[-room:]), _legend(), totals)


def plain(text: object) -> str:
    """``text`` without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "·" for letter in str(text))


def bar(entry: Entry, longest_ns: int) -> Text:
    """The stages that the client waited for, ``longest_ns`` being as wide as there is room."""
    drawn = Text()
    now_ns = 0
    for stage, style in STAGES.items():
        now_ns += entry.get(f"{stage}_ns") or 0
        upto = round(BAR_CELLS * now_ns / max(longest_ns, 1))
        drawn.append("█" * (upto - len(drawn)), style)
    return drawn


def _nodes(nodes: dict[str, Any] | None) -> Table:
    table = Table(expand=True, box=None, padding=(0, 1))
    for title in ("node", "state", "cells", "batch", "waiting", "tokens/s", "memory", "kept KV", "hits", "accepted"):
        table.add_column(title, justify="left" if title in ("node", "state") else "right", no_wrap=True)
    if nodes is None:
        return table
    prefill = nodes["prefill"]
    table.add_row("prefill", _state(prefill["up"], prefill["state"], prefill["down_reason"]))
    for name, worker in nodes["workers"].items():
        state = _state(worker["up"], worker["state"], worker.get("down_reason"))
        table.add_row(Text(plain(name)), state, *_load(worker.get("status") or {}))
    return table


def _state(up: bool, state: str, reason: str | None) -> Text:
    return Text(plain(state), "green") if up else Text(f"down {plain(reason or '')}".strip(), "bold red")


def _load(status: dict[str, Any]) -> list[str]:
    """Cells for the worker's columns after its state; nothing where it has said nothing, a dash where it knows not."""
    if not status:
        return []
    read, can = status.get("step_read_bytes_per_s", 0), status.get("memory_bytes_per_s", 0)
    drafted = status.get("drafted_tokens", 0)
    return [
        f"{status['used_cells']:,}/{status['num_cells']:,}",
        f"{status['running_sequences']}/{status['max_sequences']}",
        str(status.get("queued_requests", 0)),
        f"{status.get('decode_tokens_per_s', 0):.1f}",
        f"{read / can:.0%} of {can / 1e9:.0f} GB/s" if can else "-",
        mebibytes(status.get("retained_bytes", 0)),
        str(status.get("prefix_hits", 0)),
        f"{status.get('accepted_tokens', 0) / drafted:.0%}" if drafted else "-",
    ]


def _requests(entries: Sequence[Entry]) -> Table:
    table = Table(expand=True, box=None, padding=(0, 1))
    table.add_column("request", no_wrap=True)
    table.add_column("route", no_wrap=True)
    table.add_column("where its time went", width=BAR_CELLS, no_wrap=True)
    for title in ("tokens", "first", "all", "exposed", "net gain"):
        table.add_column(title, justify="right", no_wrap=True)
    longest_ns = max((entry["total_ns"] for entry in entries), default=1)
    for entry in reversed(entries):
        failed = "" if entry["status"] == "ok" else f" {plain(entry['status'])}"
        table.add_row(
            Text(plain(entry["request_id"])[:12]),
            Text(_way(entry) + failed, "red" if failed else ""),
            bar(entry, longest_ns),
            f"{entry['prompt_tokens']}+{entry['completion_tokens']}",
            milliseconds(entry["ttft_ns"]),
            milliseconds(entry["total_ns"]),
            milliseconds(entry["transfer_exposed_ns"]) if entry["kv_raw_bytes"] else "-",
            _gain(entry["specialization_gain_ns"]),
        )
    return table


def _legend() -> Text:
    names = {style: stage for stage, style in reversed(STAGES.items())}
    return Text("  ").join(
        Text.assemble(("█", style), " ", name.replace("_", " ")) for style, name in reversed(names.items())
    )


def _totals(entries: Sequence[Entry]) -> Table:
    """The same sums as the dashboard's, by route and codec."""
    # Requests that were run again to test predictions were nobody's.
    asked = [entry for entry in entries if not entry.get("shadow_of")]
    ways: dict[str, list[Entry]] = defaultdict(list)
    for entry in asked:
        ways[_way(entry)].append(entry)
    table = Table(title=f"the last {len(asked)} requests", title_justify="left", expand=True, box=None, padding=(0, 1))
    table.add_column("route and codec", no_wrap=True)
    for title in ("answered", "gained", "lost", "net", "first token, median", "end to end, median", "KV sent"):
        table.add_column(title, justify="right", no_wrap=True)
    for way, found in sorted(ways.items()):
        ok = [entry for entry in found if entry["status"] == "ok" and not entry["failed_over"]]
        gains = [gain for entry in found if (gain := entry["specialization_gain_ns"]) is not None]
        first = [entry["ttft_ns"] for entry in ok if entry["ttft_ns"] is not None]
        table.add_row(
            way,
            f"{len(ok)} of {len(found)}",
            milliseconds(sum(gain for gain in gains if gain > 0)) if gains else "-",
            milliseconds(sum(gain for gain in gains if gain < 0)) if gains else "-",
            _gain(sum(gains) if gains else None),
            milliseconds(median(first) if first else None),
            milliseconds(median(entry["total_ns"] for entry in ok) if ok else None),
            mebibytes(sum(entry["kv_wire_bytes"] for entry in found)),
        )
    return table


def _way(entry: Entry) -> str:
    return plain(" ".join(part for part in (entry["route"] or "no route", entry["codec"]) if part))


def _gain(gain_ns: float | None) -> Text:
    return Text(milliseconds(gain_ns), "" if gain_ns is None else "green" if gain_ns > 0 else "red")
