"""Power of the prefill node, as a header of vLLM's answers to ``GET /health``, which the proxy asks every second."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from gpu_prefill.service import runs_on_cpu
from transfer import energy

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class PowerHeader:
    """ASGI middleware for vLLM's own server (``--middleware``).

    The power is that of the GPUs that vLLM may use or, for vLLM's CPU build, of its processor packages; where it is not
    known there is no header.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        if runs_on_cpu():
            found = energy.rapl(packages=energy.own_packages())
        else:
            found = energy.gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
        self._meter = energy.meter(found)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass everything on, with the header where it belongs."""
        power = self._meter.power() if scope.get("path") == "/health" else None

        async def send_more(message: Message) -> None:
            if power and message["type"] == "http.response.start":
                header = (energy.POWER_HEADER.lower().encode(), msgspec.json.encode(power))
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        await self._app(scope, receive, send_more)
