"""A summary of any measurement as tables: numbers alone, and one row for each thing that has the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

# Of several values of one quantity, the one to show.
_MIDDLES = ("median", "p50")
# Wider ones cannot be read; the file has the rest.
_MOST_COLUMNS = 12


class Table(NamedTuple):
    """``rows`` have as many cells as ``columns``."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def tables(summary: dict[str, Any]) -> list[Table]:
    """Everything in ``summary`` down to two levels; what lies deeper is left to the file."""
    alone = [[name, cell] for name, value in summary.items() if (cell := _cell(value)) is not None]
    found = [Table("", ["", "value"], alone)] if alone else []
    # Things that have the same numbers, such as codecs, share a table.
    found += _alike("", summary)
    for name, value in summary.items():
        if isinstance(value, dict) and not _fields(value):
            found += _alike(name, value)
        elif isinstance(value, list):
            found += _alike(name, {str(index): each for index, each in enumerate(value)})
    return found


def _alike(title: str, things: dict[str, Any]) -> Iterator[Table]:
    alike: dict[tuple[str, ...], Table] = {}
    for key, each in things.items():
        if _cell(each) is None and (fields := _fields(each)):
            table = alike.setdefault(tuple(fields), Table(title, ["", *list(fields)[:_MOST_COLUMNS]], []))
            table.rows.append([key, *list(fields.values())[:_MOST_COLUMNS]])
    yield from alike.values()


def _fields(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        return {}
    return {str(key): cell for key, each in value.items() if (cell := _cell(each)) is not None}


def _cell(value: object) -> str | None:
    """What to print; None for what takes more than a cell."""
    if isinstance(value, dict):
        middle = next((value[name] for name in _MIDDLES if name in value), None)
        return None if middle is None else _cell(middle)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, str):
        return value
    return "-" if value is None else None
