"""An engine that keeps a fixed pace, and a proxy in front of it that has one core to itself.

The engine speaks as much of vLLM's completion endpoint as the proxy asks for. Whatever differs between asking it and
asking the proxy is the proxy's.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec

from isthmus.children import Child, Children
from isthmus.ports import free_ports
from isthmus.up import GRACE_S, START_DEADLINE_S
from measurements.proxy_summary import DIRECT, PROXIED
from transfer.config import Cluster, Decode, Link, Pair, Prefill, Proxy, dump

FIRST_MS, GAP_MS = 20.0, 10.0
# A request's seed sets another gap, in milliseconds; with this one the texts are long as well.
FLOOD_SEED = 1
FLOOD_TEXT = " word" * 1000
MAX_RUNNING = 512
CONTEXT_TOKENS = 1 << 20


class FixedStack:
    """Both processes, healthy inside the context; ``urls`` has the way to each."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        engine, port = free_ports(2)
        self.model = pair.name
        self.urls = {DIRECT: f"http://127.0.0.1:{engine}", PROXIED: f"http://127.0.0.1:{port}"}
        self._cluster = Cluster(
            pair=pair,
            prefill=Prefill(port=engine, max_model_len=CONTEXT_TOKENS),
            # No worker is pinned and none can announce itself.
            decode=Decode(control_port=0),
            proxy=Proxy(port=port, registry_port=0, max_running=MAX_RUNNING, max_queued=MAX_RUNNING),
            link=Link(seal="none"),
        )
        self._folder = folder
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        config = self._folder / "fixed.toml"
        config.write_bytes(dump(self._cluster))
        cores = sorted(os.sched_getaffinity(0))
        isthmus = [sys.executable, "-P", "-m", "isthmus", "proxy", "--config", str(config)]
        children = [
            Child(
                name="engine",
                command=[sys.executable, "-P", __file__, str(self._cluster.prefill.port)],
                is_healthy=_answers(f"{self.urls[DIRECT]}/health"),
            ),
            Child(
                name="proxy",
                command=["taskset", "-c", str(cores[-1]), *isthmus],
                is_healthy=_answers(f"{self.urls[PROXIED]}/health/ready"),
                after="engine",
            ),
        ]
        with ExitStack() as exits:
            running = exits.enter_context(
                Children(children, self._folder, start_deadline_s=START_DEADLINE_S, grace_s=GRACE_S)
            )
            running.start(lambda _: None)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()


def _answers(url: str) -> Callable[[], bool]:
    def ask() -> bool:
        try:
            return httpx.get(url, timeout=0.5, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    return ask


async def engine(scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[dict[str, Any]], Any]) -> None:
    """The engine as an ASGI application."""
    if scope["type"] != "http":
        return
    if scope["path"] != "/v1/completions":
        await _reply(send, 200 if scope["path"] == "/health" else 404, b"{}")
        return
    data = bytearray()
    while True:
        message = await receive()
        data += message.get("body", b"")
        if not message.get("more_body"):
            break
    await _stream(json.loads(data), receive, send)


async def _stream(body: dict[str, Any], receive: Callable[[], Any], send: Callable[[dict[str, Any]], Any]) -> None:
    """Tokens at the pace that the body asks for, until the client is gone."""
    gone = asyncio.create_task(_disconnected(receive))
    seed = body.get("seed")
    gap_s = (GAP_MS if seed is None else seed) / 1e3
    text = FLOOD_TEXT if seed == FLOOD_SEED else " word"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    clock = asyncio.get_running_loop().time
    due_s = clock() + FIRST_MS / 1e3
    num_tokens = body["max_tokens"]
    for number in range(num_tokens):
        await asyncio.sleep(max(0.0, due_s - clock()))
        if gone.done():
            return
        reason = "length" if number == num_tokens - 1 else None
        choice = {"index": 0, "text": text, "finish_reason": reason, "token_ids": [100]}
        await _say(send, {"choices": [choice]})
        due_s = max(due_s + gap_s, clock())
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": num_tokens}
    await _say(send, {"choices": [], "usage": usage})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
    gone.cancel()


async def _disconnected(receive: Callable[[], Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _say(send: Callable[[dict[str, Any]], Any], chunk: dict[str, Any]) -> None:
    event = b"data: " + msgspec.json.encode(chunk) + b"\n\n"
    await send({"type": "http.response.body", "body": event, "more_body": True})


async def _reply(send: Callable[[dict[str, Any]], Any], status: int, body: bytes) -> None:
    headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(engine, port=int(sys.argv[1]), log_level="warning", access_log=False, lifespan="off", ws="none")
