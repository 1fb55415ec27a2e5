"""One request's stages as spans of time, for a waterfall and for a trace viewer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from measurements.ledger_entries import Spent
from transfer.errors import ConfigError

WAITED, OVERLAPPED = "what the client waits for", "on the way of the KV, at the same time"

# One after another, as the client waits for them. The worker's first token is part of `decode`.
_IN_TURN = ("queue", "tokenize", "route", "reserve", "prefill", "transfer_exposed", "decode")
_SENDING = ("gather", "encode", "d2h")
_RECEIVING = ("decode_frame", "inject")


class Span(NamedTuple):
    """A stage, in ns after the request came. ``measured`` is its length; where it begins is worked out."""

    lane: str
    stage: str
    begin_ns: int
    length_ns: int


def spans(entry: Spent) -> Iterator[Span]:
    """The stages of ``entry`` that took any time.

    The ledger has lengths, not times. What the client waits for follows in turn. The KV is there when the exposed
    transfer ends, so ``wire`` ends there; the work of either side, summed over its frames, is drawn from where ``wire``
    begins (sending) and up to where it ends (receiving).
    """
    now_ns = 0
    there_ns = 0
    for stage in _IN_TURN:
        length_ns = int(getattr(entry, f"{stage}_ns"))
        if length_ns:
            yield Span(WAITED, stage, now_ns, length_ns)
        now_ns += length_ns
        if stage == "transfer_exposed":
            there_ns = now_ns
    began_ns = max(there_ns - entry.wire_ns, 0)
    if entry.wire_ns:
        yield Span(OVERLAPPED, "wire", began_ns, entry.wire_ns)
    for stage in _SENDING:
        if length_ns := int(getattr(entry, f"{stage}_ns")):
            yield Span(OVERLAPPED, stage, began_ns, length_ns)
    for stage in _RECEIVING:
        if length_ns := int(getattr(entry, f"{stage}_ns")):
            yield Span(OVERLAPPED, stage, max(there_ns - length_ns, 0), length_ns)


def write_trace(path: Path, entries: Sequence[Spent]) -> None:
    """All ``entries`` as a trace for Perfetto or chrome://tracing, one after another; a process for each.

    Format: "Trace Event Format", complete events (``ph`` X) with microseconds. Raises :class:`ConfigError` if ``path``
    cannot be written.
    """
    events: list[dict[str, Any]] = []
    offset_ns = 0
    for number, entry in enumerate(entries, start=1):
        named = {"name": f"{entry.way}: {entry.request_id}"}
        events.append({"name": "process_name", "ph": "M", "pid": number, "args": named})
        # A lane that overlaps itself would be drawn wrong: stages of the KV get a thread each.
        threads: dict[str, int] = {}
        for span in spans(entry):
            lane = WAITED if span.lane == WAITED else span.stage
            if lane not in threads:
                threads[lane] = len(threads) + 1
                events.append(
                    {"name": "thread_name", "ph": "M", "pid": number, "tid": threads[lane], "args": {"name": lane}}
                )
            events.append(
                {
                    "name": span.stage,
                    "ph": "X",
                    "pid": number,
                    "tid": threads[lane],
                    "ts": (offset_ns + span.begin_ns) / 1e3,
                    "dur": span.length_ns / 1e3,
                    "args": {"prompt_tokens": entry.prompt_tokens, "kv_wire_bytes": entry.kv_wire_bytes},
                }
            )
        offset_ns += entry.total_ns
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
