"""``POST /tokenize``, ``/detokenize`` and ``GET /tokenizer_info``, as vLLM has them: the tokenizer of all requests."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from proxy import request_body
from proxy.gateway import Gateway
from proxy.tools import Tool
from proxy.turns import TemplateFields, Turn, for_template
from transfer.errors import RequestError

MAX_TOKENS = 1 << 20


class TokenizeBody(TemplateFields):
    """A text (``prompt``) or a conversation (``messages``), as the two inference endpoints would take it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class DetokenizeBody(BaseModel):
    """Token ids to be read as text."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_TOKENS)]


def add(app: FastAPI, gateway: Gateway) -> None:
    """The endpoints."""
    renderer = gateway.renderer

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await request_body.read(request, TokenizeBody)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages", "prompt")
        if body.messages is not None:
            tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
            tokens = await renderer.chat(for_template(body.messages), tools, body.template_options())
        else:
            tokens = await renderer.tokenize(body.prompt or "", add_special_tokens=body.add_special_tokens)
        found = {"count": len(tokens), "max_model_len": gateway.cluster.prefill.max_model_len, "tokens": tokens}
        if body.return_token_strs:
            found["token_strs"] = [renderer.vocabulary.text([token]) for token in tokens]
        return found

    @app.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, str]:
        body = await request_body.read(request, DetokenizeBody)
        renderer.require_known(body.tokens, "tokens")
        return {"prompt": renderer.vocabulary.text(body.tokens)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        return renderer.tokenizer_info() | {"model_max_length": gateway.cluster.prefill.max_model_len}
