"""What is wrong with a cluster file, said so that it can be mended: in which line, and which values a key may have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

_PLACE = re.compile(r"at `\$\.(\w+)(?:\.(\w+))?")
_UNKNOWN = re.compile(r"unknown field `(\w+)`")
_HEAD = re.compile(r"\s*\[\s*(\w+)\s*\]")
_KEY = re.compile(r"\s*(\w+)\s*=")
_NODE = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.%]+\]):([0-9]{1,5})")
_MAX_PORT = 65535


def explain(error: Exception, toml: str, schema: type) -> str:
    """What msgspec raised over the text of a file of ``schema``'s tables, with the line and the values allowed.

    The line is left out where the text does not show it, as for keys that are not there.
    """
    message = str(error)
    table, key = found.groups() if (found := _PLACE.search(message)) else (None, None)
    if unknown := _UNKNOWN.search(message):
        table, key = (table, unknown[1]) if table else (unknown[1], None)
    elif "enum" in message and table and key:
        message += f"; allowed: {', '.join(_allowed(get_type_hints(get_type_hints(schema)[table])[key]))}"
    line = _line(toml, table, key) if table else None
    return f"line {line}: {message}" if line else message


def wrong_nodes(nodes: Sequence[str], most: int) -> str | None:
    """What is wrong with ``[prefill] nodes``; None if nothing is."""
    if len(nodes) > most:
        return f"{len(nodes)} prefill nodes are more than the {most} that a proxy takes - at `$.prefill.nodes`"
    for place, node in enumerate(nodes):
        at = f"at `$.prefill.nodes[{place}]`"
        found = _NODE.fullmatch(node)
        if not found or not 1 <= int(found[1]) <= _MAX_PORT:
            return f'{node!r} is no address of a prefill node; write it as "HOST:PORT" - {at}'
        if node in nodes[:place]:
            return f"{node} is listed twice; name each prefill node once - {at}"
    return None


def _allowed(hint: Any) -> list[str]:
    """The values of a key whose type is a Literal, or one beside a number."""
    if get_origin(hint) is Literal:
        return list(map(str, get_args(hint)))
    if hint is int:
        return ["or a number"]
    return [value for part in get_args(hint) for value in _allowed(part)]


def _line(toml: str, table: str, key: str | None) -> int | None:
    """Where ``key`` of ``table`` stands, or the table's head; None if neither is in the text."""
    now = None
    head_line = None
    for number, line in enumerate(toml.splitlines(), 1):
        if head := _HEAD.match(line):
            now = head[1]
            head_line = number if now == table else head_line
        elif now == table and key and (found := _KEY.match(line)) and found[1] == key:
            return number
    return head_line
