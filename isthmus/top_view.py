"""What ``isthmus top`` shows: tables made of what the proxy said, and nothing that a name could smuggle in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from isthmus.ledger_table import mebibytes

Entry = dict[str, Any]

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
# Lines that are no requests: heading, legend, table heads, sums and rules.
OTHER_LINES = 17
FEWEST_REQUESTS = 3
# Below it columns are left out and headings are short.
WIDE_CELLS = 120
BAR_CELLS, NARROW_BAR_CELLS = 36, 20


def screen(
    url: str,
    lost: str | None,
    nodes: dict[str, Any] | None,
    entries: Sequence[Entry],
    sums: dict[str, Any] | None,
    height: int,
    width: int,
) -> RenderableType:
    """Everything, in about ``height`` lines of ``width`` cells; ``lost`` says why the proxy is not heard now."""
    wide = width >= WIDE_CELLS
    totals = _totals(entries, wide=wide)
    workers = nodes["workers"] if nodes else {}
    reasons = _reasons(nodes)
    more_prefills = len(_prefills(nodes)) - 1
    room = max(FEWEST_REQUESTS, height - OTHER_LINES - more_prefills - len(workers) - len(reasons) - totals.row_count)
    state = Text("live", "bold green") if lost is None else Text(f"not heard: {plain(lost)}", "bold red")
    heading = Text.assemble(("isthmus top  ", "bold"), plain(url), "  ", state)
    shown = _requests(entries[-room:], wide=wide)
    return Group(heading, _nodes(nodes, wide=wide), *reasons, shown, _legend(), totals, _since(sums))


def plain(text: object) -> str:
    """``text`` without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "·" for letter in str(text))


def duration(ns: float | None, *, sign: bool = False) -> str:
    """A length of time in three digits or so; ``sign`` puts a plus before gains."""
    if ns is None:
        return "-"
    plus = "+" if sign and ns > 0 else ""
    size_s = abs(ns) / 1e9
    if size_s >= 1:
        return f"{plus}{ns / 1e9:,.{0 if size_s >= 1000 else 1 if size_s >= 10 else 2}f} s"
    return f"{plus}{ns / 1e6:.{0 if size_s >= 0.1 else 1}f} ms"


def bar(entry: Entry, longest_ns: int, cells: int = BAR_CELLS) -> Text:
    """The stages that the client waited for, ``longest_ns`` being as wide as there is room."""
    drawn = Text()
    now_ns = 0
    for stage, style in STAGES.items():
        now_ns += entry.get(f"{stage}_ns") or 0
        upto = round(cells * now_ns / max(longest_ns, 1))
        drawn.append("█" * (upto - len(drawn)), style)
    return drawn


def _table(titles: dict[str, str], **options: Any) -> Table:
    """Columns by title; the value says how they are aligned."""
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False, **options)
    for title, justify in titles.items():
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    return table


def _nodes(nodes: dict[str, Any] | None, *, wide: bool) -> Table:
    """The prefill nodes and the workers; power where some node knows its own."""
    titles = ["cells", "batch", "queue", "tokens/s", "memory", "power", "J/token", "kept KV", "hits", "accepted"]
    dropped = () if wide else ("kept KV", "hits", "accepted")
    if nodes is None:
        return _table({"node": "left", "state": "left"})
    rows: list[tuple[Text, Text, dict[str, str]]] = []
    for name, prefill in _prefills(nodes).items():
        power = prefill.get("power")
        load = {"power": f"{power['watts']:.0f} W" if power else ""}
        rows.append((Text(plain(name)), _state(prefill["up"], prefill["state"]), load))
    for name, worker in nodes["workers"].items():
        rows.append(
            (Text(plain(name)), _state(worker["up"], worker["state"]), _load(worker.get("status") or {}, wide=wide))
        )
    if not any(load.get("power") for _, _, load in rows):
        dropped = (*dropped, "power", "J/token")
    titles = [title for title in titles if title not in dropped]
    table = _table({"node": "left", "state": "left"} | dict.fromkeys(titles, "right"))
    for name_cell, state, load in rows:
        table.add_row(name_cell, state, *(load.get(title, "") for title in titles))
    return table


def _prefills(nodes: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The prefill nodes by what they are called here: by their addresses only where there are several."""
    if nodes is None:
        return {}
    several = nodes.get("prefill_nodes") or {}
    return (
        {f"prefill {name}": node for name, node in several.items()}
        if len(several) > 1
        else {"prefill": nodes["prefill"]}
    )


def _reasons(nodes: dict[str, Any] | None) -> list[Text]:
    """A line for each node that is down, which says why."""
    named = _prefills(nodes) | nodes["workers"] if nodes else {}
    return [
        Text(f"{plain(name)}: {plain(node['down_reason'])}", "red", no_wrap=True, overflow="ellipsis")
        for name, node in named.items()
        if not node["up"] and node.get("down_reason")
    ]


def _state(up: bool, state: str) -> Text:
    return Text(plain(state), "green") if up else Text("down", "bold red")


def _load(status: dict[str, Any], *, wide: bool) -> dict[str, str]:
    """A worker's cells by title; nothing where it has said nothing, a dash where it knows not."""
    if not status:
        return {}
    read, can = status.get("step_read_bytes_per_s", 0), status.get("memory_bytes_per_s", 0)
    drafted = status.get("drafted_tokens", 0)
    return {
        "cells": f"{status['used_cells']:,}/{status['num_cells']:,}",
        "batch": f"{status['running_sequences']}/{status['max_sequences']}",
        "queue": str(status.get("queued_requests", 0)),
        "tokens/s": f"{status.get('decode_tokens_per_s', 0):.1f}",
        "memory": f"{read / can:.0%}" + (f" of {can / 1e9:.0f} GB/s" if wide else "") if can else "-",
        **_power(status),
        "kept KV": mebibytes(status.get("retained_bytes", 0)),
        "hits": str(status.get("prefix_hits", 0)),
        "accepted": f"{status.get('accepted_tokens', 0) / drafted:.0%}" if drafted else "-",
    }


def _power(status: dict[str, Any]) -> dict[str, str]:
    """Watts of the worker's packages, joules for each token that it makes; nothing where they are not known."""
    if status.get("package_watts") is None:
        return {}
    watts = status["package_watts"] + (status.get("dram_watts") or 0.0)
    rate = status.get("decode_tokens_per_s", 0)
    return {"power": f"{watts:.0f} W", "J/token": f"{watts / rate:.2g}" if rate > 0 else "-"}


def _requests(entries: Sequence[Entry], *, wide: bool) -> Table:
    cells = BAR_CELLS if wide else NARROW_BAR_CELLS
    numbers = ["tokens", "first", "all", "exposed", "net gain"] if wide else ["tokens", "first", "all", "net gain"]
    titles = {"request": "left", "route": "left", "where its time went": "left"} | dict.fromkeys(numbers, "right")
    table = _table(titles)
    longest_ns = max((entry["total_ns"] for entry in entries), default=1)
    for entry in reversed(entries):
        failed = "" if entry["status"] == "ok" else f" {plain(entry['status'])}"
        said: dict[str, RenderableType] = {
            "tokens": f"{entry['prompt_tokens']}+{entry['completion_tokens']}",
            "first": duration(entry["ttft_ns"]),
            "all": duration(entry["total_ns"]),
            "exposed": duration(entry["transfer_exposed_ns"]) if entry["kv_raw_bytes"] else "-",
            "net gain": _gain(entry["specialization_gain_ns"]),
        }
        table.add_row(
            Text(plain(entry["request_id"])[: 12 if wide else 8]),
            Text(_way(entry) + failed, "red" if failed else ""),
            bar(entry, longest_ns, cells),
            *(said[title] for title in numbers),
        )
    return table


def _legend() -> Text:
    names = {style: stage for stage, style in reversed(STAGES.items())}
    return Text("  ").join(
        Text.assemble(("█", style), " ", name.replace("_", " ")) for style, name in reversed(names.items())
    )


def _totals(entries: Sequence[Entry], *, wide: bool) -> Table:
    """The same sums as the dashboard's, by route and codec."""
    # Requests that were run again to test predictions were nobody's.
    asked = [entry for entry in entries if not entry.get("shadow_of")]
    ways: dict[str, list[Entry]] = defaultdict(list)
    for entry in asked:
        ways[_way(entry)].append(entry)
    medians = ["first token, median", "end to end, median"] if wide else ["first", "all"]
    title = f"the last {len(asked)} requests" + ("" if wide else "; first and all: medians")
    titles = {"route and codec": "left"} | dict.fromkeys(
        ("answered", "gained", "lost", "net", *medians, "KV sent"), "right"
    )
    table = _table(titles, title=title, title_justify="left")
    for way, found in sorted(ways.items()):
        ok = [entry for entry in found if entry["status"] == "ok" and not entry["failed_over"]]
        gains = [gain for entry in found if (gain := entry["specialization_gain_ns"]) is not None]
        first = [entry["ttft_ns"] for entry in ok if entry["ttft_ns"] is not None]
        table.add_row(
            way,
            f"{len(ok)} of {len(found)}",
            duration(sum(gain for gain in gains if gain > 0)) if gains else "-",
            duration(sum(gain for gain in gains if gain < 0)) if gains else "-",
            _gain(sum(gains) if gains else None),
            duration(median(first) if first else None),
            duration(median(entry["total_ns"] for entry in ok) if ok else None),
            mebibytes(sum(entry["kv_wire_bytes"] for entry in found)),
        )
    return table


def _since(sums: dict[str, Any] | None) -> Text:
    """What all requests since the ledger began came to; nothing as long as there are none."""
    if not sums or not sums["ways"]:
        return Text()
    requests, gained_ns, lost_ns = (
        sum(way[name] for way in sums["ways"]) for name in ("requests", "gained_ns", "lost_ns")
    )
    since = plain(sums["since"])[:16].replace("T", " ")
    sums_of_split = f"splitting gained {duration(gained_ns)}, lost {duration(-lost_ns)}, net "
    return Text.assemble(
        f"{requests:,} request{'s' * (requests != 1)} since {since}: {sums_of_split}", _gain(gained_ns + lost_ns)
    )


def _way(entry: Entry) -> str:
    return plain(" ".join(part for part in (entry["route"] or "no route", entry["codec"]) if part))


def _gain(gain_ns: float | None) -> Text:
    style = "" if gain_ns is None else "green" if gain_ns > 0 else "red"
    return Text(duration(gain_ns, sign=True), style)
