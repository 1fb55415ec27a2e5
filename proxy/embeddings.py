"""``/v1/embeddings``: passed on to a whole engine with an embedding model, such as ``vllm serve --runner pooling``.

Prefill is all that an embedding takes, so there is nothing to split.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated

import httpx
import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from proxy import request_body
from proxy.api_keys import ApiKey
from proxy.failures import NotServedError
from proxy.openai import CHARACTERS_PER_TOKEN, Prompt, as_prompts
from proxy.rates import Rates
from transfer.config import Proxy
from transfer.errors import CapacityError, EngineError, LinkError

CONNECT_S = 3.0
ANSWER_S = 60.0
MAX_ANSWER_BYTES = 64 << 20
MAX_INPUTS = 2048  # OpenAI's


class EmbeddingBody(BaseModel):
    """``POST /v1/embeddings``, as far as it is looked at here; the engine gets all of it."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    input: Annotated[list[Prompt], Field(max_length=MAX_INPUTS), BeforeValidator(as_prompts)]

    @property
    def guessed_tokens(self) -> int:
        """About how many tokens all inputs have, by their length."""
        return sum(1 + len(each) // (CHARACTERS_PER_TOKEN if isinstance(each, str) else 1) for each in self.input)


class _Usage(msgspec.Struct):
    total_tokens: int = 0


class _Answer(msgspec.Struct):
    usage: _Usage


def add(app: FastAPI, config: Proxy, rates: Rates) -> None:
    """Serve ``/v1/embeddings`` from ``config.embeddings_url``, at most ``config.max_running`` requests at once."""
    running: set[object] = set()

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        if not config.embeddings_url:
            raise NotServedError(
                "no engine here makes embeddings; start one (vllm serve MODEL --runner pooling) and name it in "
                "[proxy] embeddings_url"
            )
        api_key: ApiKey = request.state.api_key
        rates.admit(api_key)
        body = await request_body.read(request, EmbeddingBody)
        if len(running) >= config.max_running:
            raise CapacityError(f"{config.max_running} requests for embeddings are running already")
        rates.spend(api_key, body.guessed_tokens)
        here = object()
        running.add(here)
        try:
            status, answer = await _ask(f"{config.embeddings_url.rstrip('/')}/v1/embeddings", body.model_dump_json())
        finally:
            running.discard(here)
        rates.spend(api_key, _tokens(answer) - body.guessed_tokens)
        return Response(answer, status, media_type="application/json")


async def _ask(url: str, body: str) -> tuple[int, bytes]:
    """Status and body of the engine's answer, where that is one or says what is wrong with the request."""
    answer = bytearray()
    try:
        async with (
            httpx.AsyncClient(timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S)) as http,
            http.stream("POST", url, content=body, headers={"Content-Type": "application/json"}) as response,
        ):
            async for part in response.aiter_bytes():
                answer += part
                if len(answer) > MAX_ANSWER_BYTES:
                    raise EngineError(f"the engine's embeddings are over {MAX_ANSWER_BYTES} bytes; ask for fewer")
    except httpx.HTTPError as error:
        raise LinkError(f"the engine for embeddings does not answer: {error or type(error).__name__}") from None
    if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise EngineError(f"the engine for embeddings failed with status {response.status_code}; its log says why")
    return response.status_code, bytes(answer)


def _tokens(answer: bytes) -> int:
    try:
        return msgspec.json.decode(answer, type=_Answer).usage.total_tokens
    except msgspec.DecodeError:
        return 0
