"""Tools: what a client offers, how the model hears of them, and the schema of an answer that must call one.

Fields: https://platform.openai.com/docs/guides/function-calling.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from proxy.constraints import Schema
from transfer.errors import RequestError

MAX_TOOLS = 128
MAX_CALLS = 16

Choice = Literal["auto", "required", "named"]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Function(_Part):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: Schema | None = None


class Tool(_Part):
    """OpenAI's wrapping of a function."""

    type: Literal["function"]
    function: Function


class FunctionName(_Part):
    """Which function."""

    name: str


class NamedTool(_Part):
    """``tool_choice`` for one function."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool
FunctionChoice = Literal["none", "auto"] | FunctionName


class ToolUse(NamedTuple):
    """The tools of one request. ``callable_tools`` are those that it lets the model call."""

    tools: Sequence[Tool]
    choice: Choice
    callable_tools: Sequence[Tool]
    max_calls: int

    def for_template(self) -> list[dict[str, Any]]:
        """OpenAI's form, which chat templates take."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def schema(self) -> Schema | None:
        """What the whole answer must match: a list of calls, one function's arguments, or None where it may be text."""
        if self.choice == "auto":
            return None
        if self.choice == "named":
            return _parameters(self.callable_tools[0])
        calls = [_call_schema(tool) for tool in self.callable_tools]
        answer: Schema = {"type": "array", "minItems": 1, "maxItems": self.max_calls, "items": {"anyOf": calls}}
        definitions = _definitions(self.callable_tools)
        return answer | ({"$defs": definitions} if definitions else {})


def use(tools: Sequence[Tool] | None, choice: ToolChoice | None, *, parallel: bool) -> ToolUse | None:
    """What a request's fields come to, None if no tool may be called; :class:`RequestError` if they contradict."""
    tools = tools or ()
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            raise RequestError(f"tool_choice names {choice.function.name!r}, which tools does not have", "tool_choice")
        return ToolUse(tools, "named", named[:1], 1)
    if choice == "required" and not tools:
        raise RequestError('tool_choice = "required" needs tools', "tool_choice")
    if choice == "none" or not tools:
        return None
    return ToolUse(tools, "required" if choice == "required" else "auto", tools, MAX_CALLS if parallel else 1)


def use_of_functions(functions: Sequence[Function], choice: FunctionChoice | None) -> ToolUse | None:
    """The same for ``functions`` and ``function_call``, OpenAI's fields before there were tools: one call at most.

    Raises :class:`RequestError` if they contradict.
    """
    tools = [Tool(type="function", function=function) for function in functions]
    if isinstance(choice, FunctionName):
        if choice.name not in (function.name for function in functions):
            raise RequestError(f"function_call names {choice.name!r}, which functions does not have", "function_call")
        return use(tools, NamedTool(type="function", function=choice), parallel=False)
    return use(tools, choice, parallel=False)


def spell_out(turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``turns`` for a chat template that knows nothing of tools: all of it as text, in the form of Hermes 2 Pro.

    That form (https://github.com/NousResearch/Hermes-Function-Calling) is the most widely trained one.
    """
    spelled: list[dict[str, Any]] = []
    for turn in turns:
        if turn["role"] == "tool":
            said = f"<tool_response>\n{turn['content']}\n</tool_response>"
            if spelled and spelled[-1]["role"] == "user":
                spelled[-1] = {"role": "user", "content": f"{spelled[-1]['content']}\n{said}"}
            else:
                spelled.append({"role": "user", "content": said})
        elif calls := turn.get("tool_calls"):
            written = [f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>" for call in calls]
            spelled.append({"role": "assistant", "content": "\n".join(filter(None, [turn["content"], *written]))})
        else:
            spelled.append(turn)
    if not tools:
        return spelled
    told = spelled[0]["content"] + "\n\n" if spelled[0]["role"] == "system" else ""
    rest = spelled[1:] if told else spelled
    return [{"role": "system", "content": told + _manual(tools)}, *rest]


def _manual(tools: Sequence[dict[str, Any]]) -> str:
    listed = "\n".join(json.dumps(tool["function"]) for tool in tools)
    return (
        "You can call functions. These are the functions, with JSON schemas of their arguments:\n"
        f"<tools>\n{listed}\n</tools>\n"
        "When one helps, answer with nothing but its name and arguments as JSON between tags, like this:\n"
        '<tool_call>\n{"name": "a_function", "arguments": {"an_argument": "its value"}}\n</tool_call>'
    )


def _parameters(tool: Tool) -> Schema:
    return tool.function.parameters or {"type": "object", "properties": {}}


def _call_schema(tool: Tool) -> Schema:
    arguments = {key: value for key, value in _parameters(tool).items() if key != "$defs"}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _definitions(tools: Sequence[Tool]) -> Schema:
    """All tools' ``$defs``, which references look for at the schema's root."""
    found: Schema = {}
    for tool in tools:
        for name, definition in _parameters(tool).get("$defs", {}).items():
            if found.setdefault(name, definition) != definition:
                raise RequestError(f"tools define {name!r} in two ways; rename one in $defs", "tools")
    return found
