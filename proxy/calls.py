"""Tool calls in what a model writes, read as it comes.

Free answers are read with the tokenizer's own ``response_template`` if it has one, else in the form of Hermes 2 Pro
(``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``), by transformers' parser. Answers that must be calls are
JSON by their grammar: a list of calls, or one function's arguments.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from proxy.tools import ToolUse

HERMES = {
    "version": 1,
    # Nothing of an answer stands in the prompt.
    "start_anchor_pattern": "$",
    "fields": {
        "content": {"content": "text"},
        "tool_calls": {"open": "<tool_call>", "close": "</tool_call>", "content": "json", "repeats": True},
    },
}


class Call(NamedTuple):
    """A call, or more of its arguments (JSON) if ``name`` is None. ``number`` counts an answer's calls."""

    number: int
    id: str | None
    name: str | None
    arguments: str


Part = str | Call


class Reader(Protocol):
    """Takes an answer apart into text and calls."""

    def feed(self, text: str) -> list[Part]:
        """What is certain after ``text``."""

    def close(self) -> list[Part]:
        """What was held back, now that no more text comes."""


def reader(use: ToolUse, template: dict[str, Any] | None, prompt: str) -> Reader:
    """The reader of an answer to ``prompt``; ``template`` is the tokenizer's ``response_template``."""
    match use.choice:
        case "auto":
            return FreeReader(use, template or HERMES, prompt if template else "")
        case "required":
            return ListReader()
        case "named":
            return ArgumentsReader(use.callable_tools[0].function.name)


class FreeReader:
    """Text with calls in it; a call that is no JSON comes out as the text that it is."""

    def __init__(self, use: ToolUse, template: dict[str, Any], prompt: str) -> None:
        self._use = use
        self._template = template
        self._parser = self._new_parser(prompt)
        self._num_calls = 0
        # Read, but not said yet: a delimiter that has begun, a call that is still open. And blanks around calls.
        self._unsaid = ""
        self._blanks = ""

    def feed(self, text: str) -> list[Part]:
        """As the protocol says."""
        # Character by character: so it is known what had come when the parser says something, or fails.
        return _joined([part for character in text for part in self._feed(character)])

    def close(self) -> list[Part]:
        """As the protocol says."""
        try:
            parts = self._parts(self._parser.finalize()[1])
        except ValueError:
            parts = self._text(self._unsaid)
        return parts if self._num_calls else _joined([*parts, self._blanks])

    def _feed(self, character: str) -> list[Part]:
        self._unsaid += character
        try:
            return self._parts(self._parser.feed(character))
        except ValueError:
            self._parser = self._new_parser("")
            said, self._unsaid = self._unsaid, ""
            return self._text(said)

    def _new_parser(self, prompt: str) -> Any:
        from transformers.utils.chat_parsing import ResponseParser

        return ResponseParser(self._template, prefix=prompt, tools=self._use.for_template())

    def _parts(self, events: Sequence[dict[str, Any]]) -> list[Part]:
        parts: list[Part] = []
        for event in events:
            if event["field"] == "content" and event["type"] == "region_chunk":
                parts += self._text(event["text"])
                self._unsaid = self._unsaid[len(event["text"]) :]
            elif event["field"] == "tool_calls" and event["type"] == "region_close":
                values = event["value"] if isinstance(event["value"], list) else [event["value"]]
                parts += [call for value in values for call in self._call(value)]
                self._unsaid = ""
        return parts

    def _text(self, text: str) -> list[Part]:
        """``text``, but blanks only before more text."""
        said, self._blanks = self._blanks + text, ""
        if said.strip():
            return [said]
        self._blanks = said
        return []

    def _call(self, value: Any) -> list[Part]:
        function = value.get("function", value) if isinstance(value, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("a call needs a name")
        if self._num_calls == self._use.max_calls:
            return []
        self._num_calls += 1
        arguments = function.get("arguments", function.get("parameters", {}))
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return [Call(self._num_calls - 1, _new_id(), function["name"], written)]


class ListReader:
    """A JSON list of calls; each comes out when it is complete."""

    def __init__(self) -> None:
        self._rest = ""
        self._num_calls = 0
        self._decoder = json.JSONDecoder()

    def feed(self, text: str) -> list[Part]:
        """As the protocol says."""
        self._rest += text
        parts: list[Part] = []
        # Only a closing brace can complete a call.
        while "}" in text:
            self._rest = self._rest.lstrip(" \t\r\n[,")
            try:
                call, end = self._decoder.raw_decode(self._rest)
            except ValueError:
                break
            self._rest = self._rest[end:]
            parts.append(
                Call(self._num_calls, _new_id(), call["name"], json.dumps(call["arguments"], ensure_ascii=False))
            )
            self._num_calls += 1
        return parts

    def close(self) -> list[Part]:
        """A call that was cut off is none."""
        return []


class ArgumentsReader:
    """One function's arguments, as they come."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def feed(self, text: str) -> list[Part]:
        """As the protocol says."""
        if not text:
            return []
        name, self._name = self._name, None
        return [Call(0, _new_id() if name else None, name, text)]

    def close(self) -> list[Part]:
        """Nothing is held back."""
        return []


def _joined(parts: Sequence[Part]) -> list[Part]:
    """``parts`` with neighbouring texts as one."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part:
            joined.append(part)
    return joined


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
