"""Answers in OpenAI's two shapes, whole and as chunks of a stream.

Shapes: https://platform.openai.com/docs/api-reference/chat and https://platform.openai.com/docs/api-reference/completions.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import msgspec

from proxy.ledger import Account
from transfer.messages import FinishReason

Chunk = dict[str, Any]
DONE = b"data: [DONE]\n\n"


def sse(chunk: Chunk) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def usage(account: Account) -> dict[str, Any]:
    """OpenAI's token counts."""
    return {
        "prompt_tokens": account.prompt_tokens,
        "completion_tokens": account.completion_tokens,
        "total_tokens": account.prompt_tokens + account.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": account.cached_tokens},
    }


class Format(ABC):
    """What chat and completions share: the envelope around ``choices``."""

    id_prefix: ClassVar[str]
    chunk_object: ClassVar[str]
    whole_object: ClassVar[str]

    def __init__(self, request_id: str, model: str, *, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._base = {"id": f"{self.id_prefix}-{request_id}", "created": int(time.time()), "model": model}

    def opening(self) -> list[Chunk]:
        """Chunks before the first text."""
        return []

    def delta(self, text: str) -> Chunk:
        """A chunk of text."""
        return self._chunk([self._delta_choice(text, None)])

    def closing(self, reason: FinishReason, account: Account) -> list[Chunk]:
        """Chunks after the last text: ``finish_reason``, then token counts if the client asked for them."""
        chunks = [self._chunk([self._delta_choice("", reason)])]
        if self._include_usage:
            chunks.append(self._chunk([]) | {"usage": usage(account)})
        return chunks

    def whole(self, text: str, reason: FinishReason, account: Account) -> Chunk:
        """The answer to a request that does not stream."""
        choice = {"index": 0, **self._message(text), "logprobs": None, "finish_reason": reason}
        return self._base | {"object": self.whole_object, "choices": [choice], "usage": usage(account)}

    def _chunk(self, choices: list[dict[str, Any]]) -> Chunk:
        chunk = self._base | {"object": self.chunk_object, "choices": choices}
        # A client that asked for usage sees the field, null, in every chunk but the last.
        return chunk | {"usage": None} if self._include_usage else chunk

    @abstractmethod
    def _delta_choice(self, text: str, reason: FinishReason | None) -> dict[str, Any]:
        """The choice of a chunk."""

    @abstractmethod
    def _message(self, text: str) -> dict[str, Any]:
        """The text in a whole answer's choice."""


class ChatFormat(Format):
    """``chat.completion`` and its chunks."""

    id_prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def opening(self) -> list[Chunk]:
        """The role comes in a chunk of its own."""
        choice = {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return [self._chunk([choice])]

    def _delta_choice(self, text: str, reason: FinishReason | None) -> dict[str, Any]:
        return {"index": 0, "delta": {"content": text} if text else {}, "logprobs": None, "finish_reason": reason}

    def _message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}


class CompletionFormat(Format):
    """``text_completion`` and its chunks."""

    id_prefix = "cmpl"
    chunk_object = "text_completion"
    whole_object = "text_completion"

    def _delta_choice(self, text: str, reason: FinishReason | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}

    def _message(self, text: str) -> dict[str, Any]:
        return {"text": text}
