"""The FastAPI application: endpoints, and errors in OpenAI's form wherever they arise."""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import msgspec
import structlog
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from proxy import api_keys, openapi, request_body, tokenization
from proxy.answer import REQUEST_ID_HEADER, Answer
from proxy.api_keys import ApiKey
from proxy.dashboard import serve as dashboard
from proxy.decode_node import DecodeNode
from proxy.failures import NotServedError, describe, error_body
from proxy.gateway import Call, Gateway
from proxy.guard import Guard
from proxy.openai import B, ChatBody, CompletionBody, require_model
from proxy.rates import Rates
from proxy.router import CODEC_HEADER, parse_codec, parse_route
from proxy.router import HEADER as ROUTE_HEADER
from transfer.config import Cluster
from transfer.errors import IsthmusError, RequestError

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

log = structlog.get_logger()


def create_app(cluster: Cluster) -> FastAPI:
    """The proxy of ``cluster``; its clients to both nodes live as long as the application runs."""
    gateway = Gateway(cluster)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with gateway.open():
            yield

    app = FastAPI(title="Isthmus", lifespan=lifespan)
    app.add_middleware(Guard, keys=api_keys.load(cluster.proxy.api_keys_file))
    app.state.gateway = gateway
    rates = Rates(cluster.proxy.requests_per_minute, cluster.proxy.tokens_per_minute)
    _add_inference(app, gateway, rates)
    tokenization.add(app, gateway)
    _add_views(app, gateway)
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
        return Answer(gateway, call, lambda tokens: rates.spend(api_key, tokens - guessed_tokens))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, ChatBody)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, CompletionBody)

    @app.post("/v1/embeddings")
    async def embeddings() -> Response:
        raise NotServedError(
            "no embeddings here: both engines run the model as a generator; send them to a server with --runner pooling"
        )

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


def _add_views(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        up = {"prefill": gateway.prefill.up, "decode": gateway.workers.up}
        some = any(up.values())
        body: dict[str, Any] = {"status": "ok" if some else "down"}
        body |= {node: "up" if is_up else "down" for node, is_up in up.items()}
        body["workers"] = {node.name: node.state for node in gateway.workers}
        return JSONResponse(body, 200 if some else 503)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        some = gateway.prefill.up or gateway.workers.up
        return JSONResponse({"status": "ok" if some else "down"}, 200 if some else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(gateway.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/ledger")
    async def ledger(last: Annotated[int, Query(ge=1, le=1_000_000)] = 100) -> Response:
        entries = msgspec.json.encode({"entries": gateway.ledger.last(last)})
        return Response(entries, media_type="application/json")

    @app.get("/nodes")
    async def nodes() -> Response:
        prefill, workers = gateway.prefill, gateway.workers
        view = {
            "prefill": {"url": prefill.url, "up": prefill.up, "down_reason": prefill.down_reason},
            # The one that the cluster file pins, once more.
            "decode": workers.pinned and _view(workers.pinned),
            "workers": {node.name: _view(node) for node in workers},
        }
        return Response(msgspec.json.encode(view), media_type="application/json")


def _add_errors(app: FastAPI, gateway: Gateway) -> None:
    @app.exception_handler(IsthmusError)
    async def planned(request: Request, error: IsthmusError) -> JSONResponse:
        failed = describe(error)
        gateway.metrics.refused(failed.code)
        request_id = request.headers.get(REQUEST_ID_HEADER, "")
        echo = {REQUEST_ID_HEADER: request_id} if _REQUEST_ID.fullmatch(request_id) else {}
        return JSONResponse(failed.body, failed.status, failed.headers | echo)

    @app.exception_handler(Exception)
    async def unplanned(_request: Request, error: Exception) -> JSONResponse:
        log.error("request failed unexpectedly", exc_info=error)
        failed = describe(error)
        gateway.metrics.refused(failed.code)
        return JSONResponse(failed.body, failed.status)

    @app.exception_handler(HTTPException)
    async def unknown_path(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        body = error_body(message, "invalid_request_error", None, str(error.detail).lower().replace(" ", "_"))
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def bad_query(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse(describe(RequestError(f"{first['loc'][-1]}: {first['msg']}", first["loc"][-1])).body, 400)


def _view(node: DecodeNode) -> dict[str, Any]:
    return {
        "endpoint": node.endpoint,
        "up": node.up,
        "state": node.state,
        "down_reason": node.down_reason,
        "welcome": node.welcome,
        "status": node.status,
    }


async def _read_call(request: Request, kind: type[B], gateway: Gateway) -> Call:
    """Everything the client says, checked; :class:`RequestError` names what is wrong."""
    request_id = request.headers.get(REQUEST_ID_HEADER) or uuid.uuid4().hex
    if not _REQUEST_ID.fullmatch(request_id):
        raise RequestError("the request id is 1 to 64 letters, digits, or . _ : -", REQUEST_ID_HEADER)
    codec = parse_codec(request.headers.get(CODEC_HEADER))
    forced_route = parse_route(request.headers.get(ROUTE_HEADER))
    body = await request_body.read(request, kind)
    require_model(body.model, gateway.model)
    body.check()
    return Call(request_id, body, forced_route, codec, request.state.api_key)
