"""vLLM's completion endpoint without an engine, as far as the proxy uses it.

Token ids are 42 for a first token and 43, 44, ... after it; log probabilities are -0.5, with token 7 behind each.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse


@dataclass
class PrefillScript:
    """How vLLM answers, and what goes wrong."""

    first_text: str = "one"
    texts: list[str] = field(default_factory=lambda: ["one", " two", " three"])
    finish_reason: str = "length"
    export: dict[str, Any] = field(default_factory=lambda: {"exported_tokens": 5, "complete": True})
    refuse: tuple[int, str] | None = None
    hang: bool = False
    endless: bool = False
    fail_in_stream: bool = False
    # The ids of texts that some other node is to go on after.
    spelling: dict[str, list[int]] = field(default_factory=dict)

    def ids(self, text: str, otherwise: int) -> list[int]:
        return self.spelling.get(text, [otherwise])


class FakePrefill:
    """``app`` serves; ``bodies`` holds the requests, ``open`` counts those that are being served."""

    def __init__(self) -> None:
        self.script = PrefillScript()
        self.bodies: list[dict[str, Any]] = []
        self.open = 0
        self.app = FastAPI()
        self.health_headers: dict[str, str] = {}
        self.app.get("/health")(lambda: Response(headers=self.health_headers))
        self.app.post("/v1/completions")(self.completions)

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if self.script.refuse:
            status, message = self.script.refuse
            return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": status}}, status)
        if body.get("stream"):
            return StreamingResponse(self._stream(body), media_type="text/event-stream")
        self.open += 1
        try:
            while self.script.hang and not await request.is_disconnected():
                await asyncio.sleep(0.01)
        finally:
            self.open -= 1
        choice = {
            "index": 0,
            "text": self.script.first_text,
            "finish_reason": self.script.finish_reason,
            "token_ids": self.script.ids(self.script.first_text, 42),
            "prompt_token_ids": body["prompt"],
            "logprobs": _logprobs(body, [42]),
            "prompt_logprobs": _prompt_logprobs(body),
        }
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1, "total_tokens": len(body["prompt"]) + 1}
        return JSONResponse(
            {"choices": [choice], "usage": usage, "kv_transfer_params": {"isthmus": self.script.export}}
        )

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        self.open += 1
        try:
            yield ": keep-alive\n\n"
            choices = range(body.get("n", 1))
            for number, text in enumerate(self.script.texts):
                echo = body.get("echo") and number == 0
                for index in choices:
                    choice = {"index": index, "text": ("[prompt]" if echo else "") + text, "finish_reason": None}
                    choice["logprobs"] = _logprobs(body, [42 + number], body["prompt"] if echo else [])
                    if body.get("return_token_ids"):
                        choice["token_ids"] = self.script.ids(text, 42 + number)
                    yield _event({"choices": [choice]})
            if self.script.fail_in_stream:
                yield _event({"error": {"message": "out of memory", "type": "x", "code": 500}})
                return
            while self.script.endless:
                yield _event({"choices": [{"index": 0, "text": "x", "finish_reason": None}]})
                await asyncio.sleep(0.01)
            for index in choices:
                yield _event({"choices": [{"index": index, "text": "", "finish_reason": self.script.finish_reason}]})
            made = len(self.script.texts) * len(choices)
            counts = {"prompt_tokens": len(body["prompt"]), "completion_tokens": made}
            yield _event({"choices": [], "usage": counts})
            yield "data: [DONE]\n\n"
        finally:
            self.open -= 1


def _logprobs(body: dict[str, Any], tokens: list[int], prompt: list[int] | None = None) -> dict[str, Any] | None:
    """As vLLM writes them: the token itself, then the likeliest; nothing for a prompt's first token."""
    if body["logprobs"] is None:
        return None
    prompt = prompt or []
    every = [*prompt, *tokens]
    top = [{f"token_id:{token}": -0.5, "token_id:7": -1.5} if body["logprobs"] else {} for token in every]
    return {
        "tokens": [f"token_id:{token}" for token in every],
        "token_logprobs": [None if prompt and place == 0 else -0.5 for place, _ in enumerate(every)],
        "top_logprobs": [None if prompt and place == 0 else row for place, row in enumerate(top)],
        "text_offset": [0] * len(every),
    }


def _prompt_logprobs(body: dict[str, Any]) -> list[dict[str, Any] | None] | None:
    """As vLLM writes them: nothing for the first token, for each other one what stood in its place, by ids."""
    if body.get("prompt_logprobs") is None:
        return None
    rows = [{str(token): {"logprob": -0.5, "rank": 1, "decoded_token": "?"}} for token in body["prompt"][1:]]
    return [None, *rows]


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"
