"""What the proxy shows of itself: health, metrics, the ledger, nodes, and events as they happen."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

from proxy.decode_node import DecodeNode
from proxy.events import EventStream
from proxy.failures import UnknownEntryError
from proxy.gateway import Gateway
from proxy.prefill_node import PrefillNode
from proxy.store import Wanted

NDJSON = "application/x-ndjson"
MAX_SEQ = (1 << 63) - 1
# The speed that is shown is that of prompts of this length.
SHOWN_PROMPT_TOKENS = 1000

Name = Annotated[str | None, Query(max_length=256)]


def add(app: FastAPI, gateway: Gateway) -> None:
    """Give ``app`` the endpoints."""
    _add_health(app, gateway)
    _add_ledger(app, gateway)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(gateway.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/nodes")
    async def nodes() -> Response:
        return Response(nodes_view(gateway), media_type="application/json")

    @app.get("/totals")
    async def totals() -> Response:
        """Sums over all requests since the ledger began, by route and codec."""
        return Response(totals_view(gateway), media_type="application/json")

    @app.get("/events", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}})
    async def events(request: Request) -> Response:
        """Ledger entries as they are closed and, every second, what ``/nodes`` and ``/totals`` say."""
        gateway.events.require_room()
        last_id = request.headers.get("Last-Event-ID", "")
        since = min(int(last_id), MAX_SEQ) if last_id.isascii() and last_id.isdigit() else None
        return EventStream(gateway.events, gateway.ledger, nodes_view(gateway), totals_view(gateway), since)


def nodes_view(gateway: Gateway) -> bytes:
    """What the proxy knows of all nodes and of itself, as JSON."""
    prefill, workers = gateway.prefill, gateway.workers
    prefills = {node.name: _prefill(node, gateway) for node in prefill}
    return msgspec.json.encode(
        {
            # The only one, or the first that is up, once more.
            "prefill": prefills[prefill.first.name],
            "prefill_nodes": prefills,
            # The one that the cluster file pins, once more.
            "decode": workers.pinned and _worker(workers.pinned),
            "workers": {node.name: _worker(node) for node in workers},
            "proxy": {"running": gateway.admission.running, "queued": gateway.admission.queued},
            "link": {"goodput_bytes_per_s": _last_goodput(gateway)},
            "estimates": gateway.dispatcher.planner.estimates.view(),
        }
    )


def totals_view(gateway: Gateway) -> bytes:
    """What all requests came to, as JSON."""
    return msgspec.json.encode(gateway.ledger.totals.view())


def _prefill(node: PrefillNode, gateway: Gateway) -> dict[str, Any]:
    cost = gateway.dispatcher.planner.estimates.vllm(node.name).prefill.cost
    ns = cost.at(SHOWN_PROMPT_TOKENS, 1) if cost else 0
    return {
        "url": node.url,
        "up": node.up,
        "state": node.state,
        "down_reason": node.down_reason,
        "power": node.power,
        "prefill_tokens_per_s": SHOWN_PROMPT_TOKENS * 1e9 / ns if ns else None,
        "backlog_ns": node.load.backlog.ns,
        "sequences": node.load.sequences,
    }


def _worker(node: DecodeNode) -> dict[str, Any]:
    return {
        "endpoint": node.endpoint,
        "up": node.up,
        "state": node.state,
        "down_reason": node.down_reason,
        "welcome": node.welcome,
        "status": node.status and msgspec.structs.replace(node.status, index=None),
        "distrusted": node.distrusted,
    }


def _last_goodput(gateway: Gateway) -> float | None:
    """Bytes per second of the last transfer that is still in memory, None if there is none."""
    entries = reversed(gateway.ledger.last(SHOWN_PROMPT_TOKENS))
    last = next((entry for entry in entries if entry.kv_wire_bytes and entry.wire_ns), None)
    return last.kv_wire_bytes * 1e9 / last.wire_ns if last else None


def _add_health(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        up = {"prefill": gateway.prefill.up, "decode": gateway.workers.up}
        some = any(up.values())
        alarms = gateway.parity.alarms
        body: dict[str, Any] = {"status": "down" if not some else "degraded" if alarms else "ok"}
        body |= {node: "up" if is_up else "down" for node, is_up in up.items()}
        body["prefill_nodes"] = {node.name: node.state for node in gateway.prefill}
        body["workers"] = {node.name: node.state for node in gateway.workers}
        if alarms:
            body |= {"alarms": alarms, "probations": gateway.parity.probations()}
        return JSONResponse(body, 200 if some else 503)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        some = gateway.prefill.up or gateway.workers.up
        return JSONResponse({"status": "ok" if some else "down"}, 200 if some else 503)


def _add_ledger(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/ledger", responses={200: {"content": {NDJSON: {}}}})
    async def ledger(
        request: Request,
        last: Annotated[int, Query(ge=1, le=1_000_000)] = 100,
        since: Annotated[int, Query(ge=0, le=MAX_SEQ)] = 0,
        request_id: Name = None,
        route: Name = None,
        worker: Name = None,
        codec: Name = None,
        status: Name = None,
        format: Literal["json", "ndjson"] | None = None,  # noqa: A002 - the parameter's name
    ) -> Response:
        """The newest ``last`` entries after number ``since`` with the given values, newest last."""
        pages = gateway.ledger.pages(Wanted(since, request_id, route, worker, codec, status), last)
        if format == "ndjson" or (format is None and NDJSON in request.headers.get("accept", "")):
            return StreamingResponse(_lines(pages), media_type=NDJSON)
        return StreamingResponse(_list(pages), media_type="application/json")

    @app.get("/ledger/{request_id}")
    async def entry(request_id: str) -> Response:
        """The entry of one request; the last one, if clients use an id again."""
        pages = gateway.ledger.pages(Wanted(request_id=request_id), 1)
        page = await asyncio.to_thread(next, pages, None)
        if not page:
            raise UnknownEntryError(f"no request {request_id!r} is in the ledger", "request_id")
        return Response(page[0], media_type="application/json")


def _lines(pages: Iterator[list[str]]) -> Iterator[str]:
    for page in pages:
        yield "".join(f"{entry}\n" for entry in page)


def _list(pages: Iterator[list[str]]) -> Iterator[str]:
    yield '{"entries":['
    before = ""
    for page in pages:
        yield before + ",".join(page)
        before = ","
    yield "]}"
