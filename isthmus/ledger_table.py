"""A ledger entry as a table for people."""

from __future__ import annotations

from typing import Any

from rich.table import Table

# What the client waits for comes first; the stages under `overlapped` run while others do and must not be added up.
STAGES = (
    ("queue_ns", "waited for a free slot"),
    ("tokenize_ns", "chat template and tokenizer, in the proxy"),
    ("route_ns", "choice of route"),
    ("reserve_ns", "cells reserved on the decode worker"),
    ("worker_queue_ns", "waited for cells, part of reserve"),
    ("prefill_ns", "prompt computed, first token known"),
    ("local_prefill_ns", "of it, computed by the decode worker"),
    ("transfer_exposed_ns", "decode stood still for KV after that"),
    ("landing_tail_ns", "of it, after the last frame had come"),
    ("first_decode_ns", "first token of the decode worker"),
    ("decode_ns", "all tokens of the decode worker"),
)
OVERLAPPED = (
    ("gather_ns", "KV copied out of vLLM's blocks"),
    ("encode_ns", "KV encoded"),
    ("d2h_ns", "KV copied from the GPU"),
    ("wire_ns", "first frame to last, on the wire"),
    ("decode_frame_ns", "frames checked and decoded"),
    ("inject_ns", "KV written into llama.cpp"),
    ("restore_ns", "KV brought back from lower tiers"),
)


def ledger_table(entry: dict[str, Any]) -> Table:
    """``entry`` is the ``isthmus`` object of the last chunk (``proxy/ledger.py``)."""
    codec = f", codec {entry['codec']}" if entry["codec"] else ""
    table = Table(title=f"request {entry['request_id']}: route {entry['route']}{codec}", title_justify="left")
    table.add_column("stage")
    table.add_column("", justify="right")
    table.add_column("what", style="dim")
    for name, meaning in STAGES:
        table.add_row(_label(name), milliseconds(entry[name]), meaning)
    table.add_section()
    for name, meaning in OVERLAPPED:
        table.add_row(_label(name), milliseconds(entry[name]), meaning)
    table.add_section()
    raw_bytes, wire_bytes = entry["kv_raw_bytes"], entry["kv_wire_bytes"]
    share = f", {wire_bytes / raw_bytes:.0%} of raw" if raw_bytes else ""
    table.add_row("KV raw", mebibytes(raw_bytes), f"{entry['prompt_tokens']} prompt tokens, as 16-bit elements")
    table.add_row("KV wire", mebibytes(wire_bytes), f"as sent{share}")
    table.add_section()
    table.add_row("time to first token", milliseconds(entry["ttft_ns"]), "")
    table.add_row("end to end", milliseconds(entry["total_ns"]), f"{entry['completion_tokens']} tokens")
    table.add_section()
    basis = entry["prefill_alternative_basis"] or "no estimate"
    table.add_row("CPU prefill, estimated", milliseconds(entry["prefill_alternative_ns"]), basis)
    gain_ns = entry["specialization_gain_ns"]
    meaning = "CPU prefill - (prefill + exposed transfer)"
    style = None if gain_ns is None else "bold green" if gain_ns > 0 else "bold red"
    table.add_row("net gain", milliseconds(gain_ns), meaning, style=style)
    if entry["regret_ns"] is not None:
        table.add_row("regret", milliseconds(entry["regret_ns"]), "sooner by the best route that is known for it")
    return table


def milliseconds(duration_ns: float | None) -> str:
    """For people: ``-`` for a duration that does not apply."""
    return "-" if duration_ns is None else f"{duration_ns / 1e6:,.1f} ms"


def mebibytes(size_bytes: int) -> str:
    """For people."""
    return f"{size_bytes / 2**20:,.2f} MiB"


def _label(name: str) -> str:
    return name.removesuffix("_ns").replace("_", " ")
