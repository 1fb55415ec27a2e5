"""Answers in OpenAI's two shapes, whole and as chunks of a stream.

Shapes: https://platform.openai.com/docs/api-reference/chat and https://platform.openai.com/docs/api-reference/completions.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic

import msgspec

from proxy import logprobs
from proxy.calls import Call, Part, Reader
from proxy.handoff import Piece
from proxy.ledger import Account
from proxy.openai import B, ChatBody, CompletionBody
from proxy.vllm_answers import PromptLogprobs
from proxy.vocabulary import Vocabulary
from transfer.errors import EngineError
from transfer.messages import FinishReason, TokenLogprob

Chunk = dict[str, Any]
DONE = b"data: [DONE]\n\n"


def sse(chunk: Chunk) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def usage(accounts: Sequence[Account]) -> dict[str, Any]:
    """OpenAI's token counts, over all prompts of a request."""
    prompt_tokens = sum(account.prompt_tokens for account in accounts)
    completion_tokens = sum(account.completion_tokens for account in accounts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(account.cached_tokens for account in accounts)},
    }


class Choice:
    """One answer as far as it has come."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.reason: FinishReason | None = None
        self.prompt_logprobs: PromptLogprobs | None = None
        # Where, in the answer's text, the next token with log probabilities begins.
        self.offset = 0

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self.texts)

    @property
    def finish_reason(self) -> FinishReason:
        """Why the answer ended; :class:`EngineError` if nobody said."""
        if self.reason is None:
            raise EngineError("the answer ended without a finish_reason")
        return self.reason


class Format(ABC, Generic[B]):
    """What chat and completions share: the envelope around ``choices``, and what has been said so far."""

    id_prefix: ClassVar[str]
    chunk_object: ClassVar[str]
    whole_object: ClassVar[str]

    def __init__(self, request_id: str, body: B, vocabulary: Vocabulary, num_prompts: int = 1) -> None:
        self._body: B = body
        self._vocabulary = vocabulary
        self._choices = [Choice(index) for index in range(num_prompts * body.choices)]
        self._base = {"id": f"{self.id_prefix}-{request_id}", "created": int(time.time()), "model": body.model}

    def opening(self) -> list[Chunk]:
        """Chunks before the first text."""
        return []

    def take(self, piece: Piece) -> list[Chunk]:
        """Remember ``piece``, and say it in a stream."""
        choice = self._choices[piece.choice]
        choice.reason = piece.finish_reason or choice.reason
        choice.logprobs += piece.logprobs
        choice.prompt_logprobs = piece.prompt_logprobs or choice.prompt_logprobs
        return [self._chunk([delta]) for delta in self._deltas(choice, piece)]

    def closing(self, accounts: Sequence[Account]) -> list[Chunk]:
        """Chunks after the last text: every ``finish_reason``, then token counts if the client asked for them."""
        chunks = [self._chunk([self._ending(choice)]) for choice in self._choices]
        if self._body.include_usage:
            chunks.append(self._chunk([]) | {"usage": usage(accounts)})
        return chunks

    def whole(self, accounts: Sequence[Account]) -> Chunk:
        """The answer to a request that does not stream."""
        choices = [
            {"index": index, **self._message(choice), "finish_reason": self._end_of(choice)}
            for index, choice in enumerate(self._kept())
        ]
        return self._base | {"object": self.whole_object, "choices": choices, "usage": usage(accounts)}

    def _kept(self) -> list[Choice]:
        """The choices to send: of each prompt's the likeliest, where more were made than are wanted."""
        made, kept = self._body.choices, self._body.kept_choices
        if made == kept:
            return self._choices
        prompts = [self._choices[first : first + made] for first in range(0, len(self._choices), made)]
        ranked = [sorted(group, key=lambda choice: -logprobs.mean(choice.logprobs)) for group in prompts]
        return [choice for group in ranked for choice in group[:kept]]

    def _chunk(self, choices: list[dict[str, Any]]) -> Chunk:
        chunk = self._base | {"object": self.chunk_object, "choices": choices}
        # A client that asked for usage sees the field, null, in every chunk but the last.
        return chunk | {"usage": None} if self._body.include_usage else chunk

    @abstractmethod
    def _deltas(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        """Chunks' choices that say what ``piece`` adds to ``choice``, which remembers it."""

    def _end_of(self, choice: Choice) -> str:
        """The ``finish_reason`` to tell."""
        return choice.finish_reason

    @abstractmethod
    def _ending(self, choice: Choice) -> dict[str, Any]:
        """A chunk's choice that says why the answer ended."""

    @abstractmethod
    def _message(self, choice: Choice) -> dict[str, Any]:
        """What a whole answer says of a choice, apart from its index and end."""


class ChatFormat(Format[ChatBody]):
    """``chat.completion`` and its chunks."""

    id_prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(
        self, request_id: str, body: ChatBody, vocabulary: Vocabulary, new_reader: Callable[[], Reader] | None
    ) -> None:
        super().__init__(request_id, body, vocabulary)
        self._new_reader = new_reader
        # OpenAI's older form, in which an answer has one call at most.
        self._functions = bool(body.functions)
        self._readers: dict[int, Reader] = {}
        self._calls: list[list[Call]] = [[] for _ in self._choices]

    def opening(self) -> list[Chunk]:
        """The role comes in a chunk of its own."""
        return [
            self._chunk([_chat_choice(choice.index, {"role": "assistant", "content": ""})]) for choice in self._choices
        ]

    def whole(self, accounts: Sequence[Account]) -> Chunk:
        """As for all; chat has one prompt, whose log probabilities stand beside the choices, where vLLM has them."""
        found = super().whole(accounts)
        if self._body.prompt_logprobs is not None:
            found["prompt_logprobs"] = self._choices[0].prompt_logprobs
        return found

    def _deltas(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        deltas = []
        for part in self._read(choice, piece):
            if isinstance(part, Call):
                self._take_call(choice, part)
                deltas.append(_chat_choice(choice.index, self._call_delta(part)))
            else:
                choice.texts.append(part)
                deltas.append(_chat_choice(choice.index, {"content": part}))
        if piece.logprobs:
            deltas = deltas or [_chat_choice(choice.index, {})]
            deltas[0]["logprobs"] = self._logprobs(piece.logprobs)
        return deltas

    def _read(self, choice: Choice, piece: Piece) -> list[Part]:
        if self._new_reader is None:
            return [piece.text] if piece.text else []
        if choice.index not in self._readers:
            self._readers[choice.index] = self._new_reader()
        reader = self._readers[choice.index]
        return reader.feed(piece.text) + (reader.close() if piece.finish_reason else [])

    def _take_call(self, choice: Choice, call: Call) -> None:
        calls = self._calls[choice.index]
        if call.name is None:
            calls[-1] = calls[-1]._replace(arguments=calls[-1].arguments + call.arguments)
        else:
            calls.append(call)

    def _ending(self, choice: Choice) -> dict[str, Any]:
        return _chat_choice(choice.index, {}, self._end_of(choice))

    def _end_of(self, choice: Choice) -> str:
        # OpenAI ends a call that the client has named itself with "stop".
        called = self._calls[choice.index] and self._body.tool_use and self._body.tool_use.choice != "named"
        if not called or choice.finish_reason != "stop":
            return choice.finish_reason
        return "function_call" if self._functions else "tool_calls"

    def _call_delta(self, call: Call) -> dict[str, Any]:
        if self._functions:
            return {"function_call": _function(call)}
        return {"tool_calls": [{"index": call.number, **_identity(call), "function": _function(call)}]}

    def _message(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if calls := self._calls[choice.index]:
            message["content"] = choice.text or None
            if self._functions:
                message["function_call"] = _function(calls[0])
            else:
                message["tool_calls"] = [{**_identity(call), "function": _function(call)} for call in calls]
        return {"message": message, "logprobs": self._logprobs(choice.logprobs)}

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return None if self._body.num_top is None else logprobs.chat(entries, self._vocabulary)


class CompletionFormat(Format[CompletionBody]):
    """``text_completion`` and its chunks."""

    id_prefix = "cmpl"
    chunk_object = "text_completion"
    whole_object = "text_completion"

    def _deltas(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        if not piece.text and not piece.logprobs:
            return []
        choice.texts.append(piece.text)
        said = self._logprobs(piece.logprobs, choice.offset)
        choice.offset += logprobs.width(piece.logprobs, self._vocabulary)
        return [{"index": choice.index, "text": piece.text, "logprobs": said, "finish_reason": None}]

    def _ending(self, choice: Choice) -> dict[str, Any]:
        return {"index": choice.index, "text": "", "logprobs": None, "finish_reason": choice.finish_reason}

    def _message(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"text": choice.text, "logprobs": self._logprobs(choice.logprobs, 0)}
        if self._body.prompt_logprobs is not None:
            message["prompt_logprobs"] = choice.prompt_logprobs
        return message

    def _logprobs(self, entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
        # Not those that only best_of needs.
        return None if self._body.logprobs is None else logprobs.completion(entries, self._vocabulary, offset)


def _chat_choice(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _identity(call: Call) -> dict[str, Any]:
    """What is told of a call once: nothing where only more of its arguments comes."""
    return {} if call.name is None else {"id": call.id, "type": "function"}


def _function(call: Call) -> dict[str, Any]:
    return {"arguments": call.arguments} if call.name is None else {"name": call.name, "arguments": call.arguments}
