"""The conversation of a chat request: OpenAI's messages, and how chat templates want them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from transfer.errors import RequestError


def _join_parts(value: object) -> object:
    """A list of text parts as one string; strings pass."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('only parts of the form {"type": "text", "text": "..."} are supported')
        texts.append(part["text"])
    return "".join(texts)


Text = Annotated[str, BeforeValidator(_join_parts)]


class _Turn(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class CalledFunction(_Turn):
    """What the model called; ``arguments`` is JSON."""

    name: str
    arguments: str


class ToolCall(_Turn):
    """One call in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class InstructionTurn(_Turn):
    """What the model is told to be; ``developer`` is OpenAI's newer name for ``system``."""

    role: Literal["system", "developer"]
    content: Text


class UserTurn(_Turn):
    """What the user says."""

    role: Literal["user"]
    content: Text


class AssistantTurn(_Turn):
    """What the model said or called before; ``function_call`` is OpenAI's older form of ``tool_calls``."""

    role: Literal["assistant"]
    content: Text | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: CalledFunction | None = None

    @property
    def calls(self) -> list[ToolCall]:
        """In the newer form, where a call of the older one is known by its function's name."""
        older = self.function_call
        return self.tool_calls or ([ToolCall(id=older.name, function=older)] if older else [])

    @model_validator(mode="after")
    def _says_something(self) -> AssistantTurn:
        if self.content is None and not self.calls:
            raise ValueError("an assistant's message needs content or tool_calls")
        return self


class ToolTurn(_Turn):
    """What a called function gave."""

    role: Literal["tool"]
    content: Text
    tool_call_id: str


class FunctionTurn(_Turn):
    """The same before there were tools."""

    role: Literal["function"]
    name: str
    content: Text | None = None


AnyTurn = InstructionTurn | UserTurn | AssistantTurn | ToolTurn | FunctionTurn
Turn = Annotated[AnyTurn, Field(discriminator="role")]


# What apply_chat_template of transformers takes for itself.
_RESERVED = frozenset(
    (
        *("self", "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)


class TemplateFields(_Turn):
    """vLLM's fields that say how a conversation becomes a prompt; ``chat_template_kwargs`` are the template's own."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def template_options(self) -> dict[str, Any]:
        """The fields as chat templates are called with them; :class:`RequestError` for those that contradict."""
        going_on = bool(self.continue_final_message)
        if going_on and self.add_generation_prompt:
            message = "continue_final_message cannot go with add_generation_prompt = true; leave one out"
            raise RequestError(message, "continue_final_message")
        own = self.chat_template_kwargs or {}
        if taken := sorted(_RESERVED.intersection(own)):
            raise RequestError(f"chat_template_kwargs cannot set {', '.join(taken)}", "chat_template_kwargs")
        opening = not going_on if self.add_generation_prompt is None else self.add_generation_prompt
        return own | {"add_generation_prompt": opening, "continue_final_message": going_on}


def for_template(turns: Sequence[AnyTurn]) -> list[dict[str, Any]]:
    """The messages as chat templates know them: arguments as objects, no ``developer``, no ``function``."""
    return [_for_template(turn) for turn in turns]


def _for_template(turn: AnyTurn) -> dict[str, Any]:
    match turn:
        case InstructionTurn():
            return {"role": "system", "content": turn.content}
        case AssistantTurn() if turn.calls:
            calls = [_call(call) for call in turn.calls]
            return {"role": "assistant", "content": turn.content or "", "tool_calls": calls}
        case ToolTurn():
            return {"role": "tool", "content": turn.content, "tool_call_id": turn.tool_call_id}
        case FunctionTurn():
            return {"role": "tool", "content": turn.content or "", "tool_call_id": turn.name}
        case _:
            return {"role": turn.role, "content": turn.content}


def _call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError as error:
        raise RequestError(
            f"messages: the arguments of tool call {call.id!r} are not JSON: {error}", "messages"
        ) from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
