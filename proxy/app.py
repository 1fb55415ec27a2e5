"""The FastAPI application: endpoints, and errors in OpenAI's form wherever they arise."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from proxy import api_keys, embeddings, openapi, request_body, request_id, tokenization, views
from proxy.answer import Answer
from proxy.api_keys import ApiKey
from proxy.dashboard import serve as dashboard
from proxy.failures import describe, error_body
from proxy.gateway import Call, Gateway
from proxy.guard import Guard
from proxy.openai import B, ChatBody, CompletionBody, require_model
from proxy.rates import Rates
from proxy.router import CODEC_HEADER, parse_codec, parse_objectives, parse_route
from proxy.router import HEADER as ROUTE_HEADER
from transfer.config import Cluster
from transfer.errors import IsthmusError, RequestError

log = structlog.get_logger()


def create_app(cluster: Cluster) -> FastAPI:
    """The proxy of ``cluster``; its clients to both nodes live as long as the application runs."""
    gateway = Gateway(cluster)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with gateway.open():
            watched = gateway.events.watch(lambda: views.nodes_view(gateway), lambda: views.totals_view(gateway))
            watching = asyncio.create_task(watched)
            try:
                yield
            finally:
                watching.cancel()

    app = FastAPI(title="Isthmus", lifespan=lifespan)
    app.add_middleware(Guard, keys=api_keys.load(cluster.proxy.api_keys_file), refused=gateway.metrics.refused)
    app.state.gateway = gateway
    rates = Rates(cluster.proxy.requests_per_minute, cluster.proxy.tokens_per_minute)
    _add_inference(app, gateway, rates)
    embeddings.add(app, cluster.proxy, rates)
    tokenization.add(app, gateway)
    views.add(app, gateway)
    dashboard.add(app)
    _add_errors(app, gateway)
    openapi.install(app)
    return app


def _add_inference(app: FastAPI, gateway: Gateway, rates: Rates) -> None:
    async def answer(request: Request, kind: type[B]) -> Response:
        api_key: ApiKey = request.state.api_key
        rates.admit(api_key)
        call = await _read_call(request, kind, gateway)
        guessed_tokens = call.body.guessed_prompt_tokens
        rates.spend(api_key, guessed_tokens)
        left = rates.headers(api_key)
        return Answer(gateway, call, lambda tokens: rates.spend(api_key, tokens - guessed_tokens), left)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, ChatBody)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, CompletionBody)

    only = {
        "id": gateway.model,
        "object": "model",
        "created": 0,
        "owned_by": "isthmus",
        "max_model_len": gateway.cluster.prefill.max_model_len,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [only]}

    # Names may have slashes.
    @app.get("/v1/models/{model:path}")
    async def one_model(model: str) -> dict[str, Any]:
        require_model(model, gateway.model)
        return only


def _add_errors(app: FastAPI, gateway: Gateway) -> None:
    def refusal(request: Request, error: Exception) -> JSONResponse:
        failed = describe(error)
        gateway.metrics.refused(failed.code)
        return JSONResponse(failed.body, failed.status, failed.headers | _named(request))

    @app.exception_handler(IsthmusError)
    async def planned(request: Request, error: IsthmusError) -> JSONResponse:
        return refusal(request, error)

    @app.exception_handler(Exception)
    async def unplanned(request: Request, error: Exception) -> JSONResponse:
        log.error("request failed unexpectedly", exc_info=error)
        return refusal(request, error)

    @app.exception_handler(HTTPException)
    async def unknown_path(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        body = error_body(message, "invalid_request_error", None, str(error.detail).lower().replace(" ", "_"))
        return JSONResponse(body, error.status_code, {**(error.headers or {}), **_named(request)})

    @app.exception_handler(RequestValidationError)
    async def bad_query(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return refusal(request, RequestError(f"{first['loc'][-1]}: {first['msg']}", str(first["loc"][-1])))


def _named(request: Request) -> dict[str, str]:
    return {request_id.HEADER: request_id.of_refused(request.headers)}


async def _read_call(request: Request, kind: type[B], gateway: Gateway) -> Call:
    """Everything the client says, checked; :class:`RequestError` names what is wrong."""
    name = request_id.of(request.headers)
    codec = parse_codec(request.headers.get(CODEC_HEADER))
    forced_route = parse_route(request.headers.get(ROUTE_HEADER))
    objectives = parse_objectives(request.headers)
    body = await request_body.read(request, kind)
    require_model(body.model, gateway.model)
    body.check()
    trace_context = {name: request.headers[name] for name in ("traceparent", "tracestate") if name in request.headers}
    return Call(name, body, forced_route, codec, request.state.api_key, trace_context, objectives)
