"""Tool calls read out of text, however it is cut."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.calls import Call, reader
from proxy.tools import Function, NamedTool, Tool, use

WEATHER = Tool(
    type="function",
    function=Function(name="weather", parameters={"type": "object", "properties": {"town": {"type": "string"}}}),
)
CLOCK = Tool(type="function", function=Function(name="clock"))
FREE = use([WEATHER, CLOCK], "auto", parallel=True)
NAMES = st.sampled_from(["weather", "clock"])
VALUES = st.dictionaries(st.text(max_size=5), st.text(max_size=8) | st.integers() | st.booleans(), max_size=3)


def read(pieces: list[str], tools=FREE, template=None, prompt="") -> tuple[str, list[tuple[str, str]]]:
    """All text, and each call's name and arguments."""
    reading = reader(tools, template, prompt)
    parts = [part for piece in pieces for part in reading.feed(piece)] + reading.close()
    text, calls = "", {}
    for part in parts:
        if isinstance(part, Call):
            name, arguments = calls.get(part.number, ("", ""))
            calls[part.number] = (name + (part.name or ""), arguments + part.arguments)
        else:
            text += part
    assert list(calls) == list(range(len(calls)))
    return text, list(calls.values())


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[start:end] for start, end in pairwise(ends)]


def hermes(calls: list[tuple[str, dict[str, object]]]) -> str:
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>" for name, arguments in calls
    )


@given(
    before=st.text(max_size=20).filter(lambda text: "<" not in text),
    calls=st.lists(st.tuples(NAMES, VALUES), max_size=3),
    places=st.lists(st.integers(0, 500), max_size=12),
)
def test_text_and_calls_come_out_whole(before, calls, places):
    text, found = read(cut(before + hermes(calls), places))
    assert text == (before.rstrip() if calls else before)
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@given(text=st.text(alphabet="<tool_cal>/{ }x", max_size=60), places=st.lists(st.integers(0, 60), max_size=8))
def test_nothing_is_lost_of_what_only_looks_like_a_call(text, places):
    said, calls = read(cut(text, places))
    assert said.split() == text.split()
    assert not calls


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{not json}</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>[5]</tool_call>",
        '<tool_call>{"name": "clock", "argum',
    ],
)
def test_a_broken_call_is_text_and_later_calls_are_read(text):
    assert read(["so: ", text]) == ("so: " + text, [])
    if text.endswith("</tool_call>"):
        assert read([text, hermes([("clock", {})])]) == (text, [("clock", "{}")])


def test_a_call_whose_end_was_a_stop_string():
    assert read(['<tool_call>{"name": "clock", "arguments": {}}']) == ("", [("clock", "{}")])


def test_only_one_call_where_calls_may_not_be_parallel():
    alone = use([CLOCK], "auto", parallel=False)
    assert read([hermes([("clock", {}), ("clock", {"a": 1})])], alone) == ("", [("clock", "{}")])


def test_a_tokenizers_own_form():
    template = {
        "start_anchor": "<assistant>",
        "fields": {
            "content": {},
            "tool_calls": {
                "open_pattern": r"\[(?P<name>\w+)\]",
                "close": "[/]",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
        },
    }
    found = read(["ok [wea", 'ther]{"town": "Ulm"}', "[/]"], FREE, template, "<user>x<assistant>")
    assert found == ("ok", [("weather", '{"town": "Ulm"}')])


@given(calls=st.lists(st.tuples(NAMES, VALUES), min_size=1, max_size=3), places=st.lists(st.integers(0, 500)))
def test_a_list_of_calls(calls, places):
    must = use([WEATHER, CLOCK], "required", parallel=True)
    text = json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls], indent=1)
    said, found = read(cut(text, places), must)
    assert said == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_a_list_that_was_cut_off():
    must = use([CLOCK], "required", parallel=True)
    assert read(['[{"name": "clock", "arguments": {"a": {}}}, {"name": "clock", "argu'], must)[1] == [
        ("clock", '{"a": {}}')
    ]


def test_the_arguments_of_a_named_function_come_as_they_are():
    named = use([WEATHER, CLOCK], NamedTool(type="function", function={"name": "clock"}), parallel=True)
    reading = reader(named, None, "")
    first, more = reading.feed('{"a"')[0], reading.feed(": 1}")[0]
    assert (first.name, first.arguments, bool(first.id)) == ("clock", '{"a"', True)
    assert (more.name, more.arguments, more.id) == (None, ": 1}", None)
    assert reading.feed("") == reading.close() == []
