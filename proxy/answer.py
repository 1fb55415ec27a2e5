"""The HTTP side of one answer: whole or streamed, to a client that may leave at any time.

All of a request's life after parsing runs inside the response, so that there is one place where it ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import msgspec
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from proxy import request_id
from proxy.calls import reader
from proxy.failures import describe
from proxy.formats import DONE, ChatFormat, CompletionFormat, sse
from proxy.gateway import Call, Gateway
from proxy.handoff import Pieces
from proxy.hangup import until_gone
from proxy.ledger import Entry
from proxy.openai import ChatBody
from proxy.prompts import Part, parts, together
from proxy.router import HEADER as ROUTE_HEADER
from proxy.router import REASON_HEADER
from transfer.errors import IsthmusError

STALLED_CLIENT_S = 60.0

log = structlog.get_logger()


class Answer(Response):
    """Serves ``call`` and closes its ledger entries, one for each prompt, however it ends.

    ``spend`` is told how many tokens it took, prompts included. ``more_headers`` go with the answer.
    """

    def __init__(
        self, gateway: Gateway, call: Call, spend: Callable[[int], None], more_headers: dict[str, str]
    ) -> None:
        super().__init__()
        self._gateway = gateway
        self._call = call
        self._spend = spend
        self._more_headers = more_headers
        self._parts = parts(call, gateway.model)
        self._accounts = [part.account for part in self._parts]
        self._entries: list[Entry] = []
        self._started = False
        self._format = _format(call, gateway, self._parts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Serve until the answer is out or the client is gone, whichever comes first."""
        await until_gone(self._serve(send), receive)

    async def _serve(self, send: Send) -> None:
        try:
            async with aclosing(together(self._gateway, self._parts)) as pieces:
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
        async for piece in pieces:
            if not self._started:
                await self._start(send, 200, {"Content-Type": "text/event-stream; charset=utf-8", **_NO_BUFFERS})
                await self._send(send, b"".join(sse(chunk) for chunk in self._format.opening()))
            if piece.text:
                self._saw_text(piece.choice)
            for chunk in self._format.take(piece):
                await self._send(send, sse(chunk))
        chunks = self._format.closing(self._accounts)
        chunks[-1] |= self._extras(self._close("ok"))
        await self._send(send, b"".join(sse(chunk) for chunk in chunks) + DONE, last=True)

    async def _whole(self, pieces: Pieces, send: Send) -> None:
        async for piece in pieces:
            if piece.text:
                self._saw_text(piece.choice)
            self._format.take(piece)
        whole = self._format.whole(self._accounts)
        entries = self._close("ok")
        await self._json(send, 200, whole | self._extras(entries), {"Server-Timing": entries[0].server_timing()})

    def _extras(self, entries: list[Entry]) -> dict[str, Any]:
        """What the client asked for beyond OpenAI: one of each, or a list of them if there are several prompts."""
        body = self._call.body
        extras: dict[str, list[Any]] = {"isthmus": list(entries)} if body.isthmus else {}
        if body.timings_per_token:
            extras["timings"] = [entry.timings() for entry in entries]
        return {name: msgspec.to_builtins(seen if len(seen) > 1 else seen[0]) for name, seen in extras.items()}

    async def _fail(self, error: Exception, send: Send) -> None:
        """Tell the client, as a JSON answer or, once the stream has begun, as its last event."""
        failed = describe(error)
        self._close(failed.code)
        if self._started:
            await self._send(send, sse(failed.body), last=True)
        else:
            await self._json(send, failed.status, failed.body, failed.headers)

    def _close(self, status: str) -> list[Entry]:
        if not self._entries:
            self._entries = [self._gateway.close(account, status) for account in self._accounts]
            self._spend(sum(entry.prompt_tokens + entry.completion_tokens for entry in self._entries))
        return self._entries

    def _saw_text(self, choice: int) -> None:
        account = self._accounts[choice // self._call.body.choices]
        gap_ns = account.saw_text()
        if gap_ns is not None and account.route:
            self._gateway.metrics.gap(account.route, gap_ns)

    async def _json(self, send: Send, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
        data = msgspec.json.encode(body)
        await self._start(
            send, status, {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
        )
        await self._send(send, data, last=True)

    async def _start(self, send: Send, status: int, headers: dict[str, str]) -> None:
        self._started = True
        headers |= {request_id.HEADER: self._call.request_id, **self._more_headers}
        account = self._accounts[0]
        if account.route and account.reason:
            headers |= {ROUTE_HEADER: account.route, REASON_HEADER: account.reason}
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": int(status), "headers": raw})

    async def _send(self, send: Send, data: bytes, *, last: bool = False) -> None:
        async with asyncio.timeout(STALLED_CLIENT_S):
            await send({"type": "http.response.body", "body": data, "more_body": not last})


_NO_BUFFERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def _format(call: Call, gateway: Gateway, served: list[Part]) -> ChatFormat | CompletionFormat:
    vocabulary = gateway.renderer.vocabulary
    if not isinstance(call.body, ChatBody):
        return CompletionFormat(call.request_id, call.body, vocabulary, len(served))
    use, account = call.body.tool_use, served[0].account
    if use is None:
        return ChatFormat(call.request_id, call.body, vocabulary, None)
    template = gateway.renderer.response_template
    return ChatFormat(
        call.request_id, call.body, vocabulary, lambda: reader(use, template, vocabulary.text(account.prompt))
    )
