"""The HTTP side of one answer: whole or streamed, to a client that may leave at any time.

All of a request's life after parsing runs inside the response, so that there is one place where it ends.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import msgspec
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from proxy.failures import describe
from proxy.formats import DONE, ChatFormat, CompletionFormat, sse
from proxy.gateway import Call, Gateway
from proxy.handoff import Pieces
from proxy.ledger import Account, Entry
from proxy.openai import ChatBody
from proxy.router import HEADER as ROUTE_HEADER
from transfer.errors import EngineError, IsthmusError
from transfer.messages import FinishReason

STALLED_CLIENT_S = 60.0
REQUEST_ID_HEADER = "X-Request-Id"

log = structlog.get_logger()


class Answer(Response):
    """Serves ``call`` and closes its ledger entry, however it ends."""

    def __init__(self, gateway: Gateway, call: Call) -> None:
        super().__init__()
        self._gateway = gateway
        self._call = call
        self._account = Account(call.request_id, gateway.model)
        self._entry: Entry | None = None
        self._started = False
        kind = ChatFormat if isinstance(call.body, ChatBody) else CompletionFormat
        self._format = kind(call.request_id, gateway.model, include_usage=call.body.include_usage)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Serve until the answer is out or the client is gone, whichever comes first."""
        work = asyncio.create_task(self._serve(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _serve(self, send: Send) -> None:
        try:
            async with aclosing(self._gateway.pieces(self._call, self._account)) as pieces:
                if self._call.body.stream:
                    await self._stream(pieces, send)
                else:
                    await self._whole(pieces, send)
        except (TimeoutError, OSError):
            log.warning("client takes no data", request_id=self._call.request_id)
            self._close("cancelled")
        except asyncio.CancelledError:
            self._close("cancelled")
            raise
        except IsthmusError as error:
            log.warning("request failed", request_id=self._call.request_id, code=error.code, error=str(error))
            await self._fail(error, send)
        except Exception as error:
            log.exception("request failed unexpectedly", request_id=self._call.request_id)
            await self._fail(error, send)

    async def _stream(self, pieces: Pieces, send: Send) -> None:
        reason: FinishReason | None = None
        async for piece in pieces:
            if not self._started:
                await self._start(send, 200, {"Content-Type": "text/event-stream; charset=utf-8", **_NO_BUFFERS})
                await self._send(send, b"".join(sse(chunk) for chunk in self._format.opening()))
            if piece.text:
                self._saw_text()
                await self._send(send, sse(self._format.delta(piece.text)))
            reason = piece.finish_reason
        chunks = self._format.closing(_require(reason), self._account)
        entry = self._close("ok")
        if self._call.body.isthmus:
            chunks[-1]["isthmus"] = msgspec.to_builtins(entry)
        await self._send(send, b"".join(sse(chunk) for chunk in chunks) + DONE, last=True)

    async def _whole(self, pieces: Pieces, send: Send) -> None:
        texts = []
        reason: FinishReason | None = None
        async for piece in pieces:
            if piece.text:
                self._saw_text()
                texts.append(piece.text)
            reason = piece.finish_reason
        whole = self._format.whole("".join(texts), _require(reason), self._account)
        entry = self._close("ok")
        if self._call.body.isthmus:
            whole["isthmus"] = msgspec.to_builtins(entry)
        await self._json(send, 200, whole, {"Server-Timing": entry.server_timing()})

    async def _fail(self, error: Exception, send: Send) -> None:
        """Tell the client, as a JSON answer or, once the stream has begun, as its last event."""
        failed = describe(error)
        self._close(failed.code)
        if self._started:
            await self._send(send, sse(failed.body), last=True)
        else:
            await self._json(send, failed.status, failed.body, failed.headers)

    def _close(self, status: str) -> Entry:
        if self._entry is None:
            self._entry = self._gateway.close(self._account, status)
        return self._entry

    def _saw_text(self) -> None:
        gap_ns = self._account.saw_text()
        if gap_ns is not None and self._account.route:
            self._gateway.metrics.gap(self._account.route, gap_ns)

    async def _json(self, send: Send, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
        data = msgspec.json.encode(body)
        await self._start(
            send, status, {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
        )
        await self._send(send, data, last=True)

    async def _start(self, send: Send, status: int, headers: dict[str, str]) -> None:
        self._started = True
        headers |= {REQUEST_ID_HEADER: self._call.request_id}
        if self._account.route:
            headers[ROUTE_HEADER] = self._account.route
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": int(status), "headers": raw})

    async def _send(self, send: Send, data: bytes, *, last: bool = False) -> None:
        async with asyncio.timeout(STALLED_CLIENT_S):
            await send({"type": "http.response.body", "body": data, "more_body": not last})


_NO_BUFFERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _require(reason: FinishReason | None) -> FinishReason:
    if reason is None:
        raise EngineError("the answer ended without a finish_reason")
    return reason
