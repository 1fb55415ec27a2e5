"""vLLM's completion endpoint without an engine, as far as the proxy uses it."""

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


class FakePrefill:
    """``app`` serves; ``bodies`` holds the requests, ``open`` counts those that are being served."""

    def __init__(self) -> None:
        self.script = PrefillScript()
        self.bodies: list[dict[str, Any]] = []
        self.open = 0
        self.app = FastAPI()
        self.app.get("/health")(lambda: Response())
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
            "token_ids": [42],
            "prompt_token_ids": body["prompt"],
        }
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1, "total_tokens": len(body["prompt"]) + 1}
        return JSONResponse(
            {"choices": [choice], "usage": usage, "kv_transfer_params": {"isthmus": self.script.export}}
        )

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        self.open += 1
        try:
            yield ": keep-alive\n\n"
            for text in self.script.texts:
                yield _event({"choices": [{"index": 0, "text": text, "finish_reason": None}]})
            if self.script.fail_in_stream:
                yield _event({"error": {"message": "out of memory", "type": "x", "code": 500}})
                return
            while self.script.endless:
                yield _event({"choices": [{"index": 0, "text": "x", "finish_reason": None}]})
                await asyncio.sleep(0.01)
            yield _event({"choices": [{"index": 0, "text": "", "finish_reason": self.script.finish_reason}]})
            counts = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(self.script.texts)}
            yield _event({"choices": [], "usage": counts})
            yield "data: [DONE]\n\n"
        finally:
            self.open -= 1


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"
