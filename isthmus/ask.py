"""One chat completion, streamed and timed as a client sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec

from transfer.errors import EngineError, LinkError

TIMEOUT_S = 120.0
CONNECT_S = 5.0


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came back. ``ttft_ns`` is the time to the first text, ``total_ns`` to the end of the stream."""

    text: str
    completion_tokens: int
    ttft_ns: int
    total_ns: int
    ledger: dict[str, Any]

    @property
    def tpot_ns(self) -> float:
        """Time per output token after the first."""
        return (self.total_ns - self.ttft_ns) / max(1, self.completion_tokens - 1)


def request_body(model: str, question: str, *, max_tokens: int, ignore_eos: bool = False) -> dict[str, Any]:
    """A greedy, streamed chat completion that ends with token counts and the ledger."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "isthmus": True,
        **({"ignore_eos": True} if ignore_eos else {}),
    }


def ask(proxy_url: str, body: dict[str, Any], *, route: str | None, on_text: Callable[[str], None]) -> Answer:
    """POST ``body`` and call ``on_text`` with every piece of text as it comes.

    Raises :class:`LinkError` if the proxy cannot be reached or falls silent, :class:`EngineError` if it refuses or the
    stream ends early.
    """
    pieces: list[str] = []
    usage: dict[str, int] = {}
    ledger: dict[str, Any] = {}
    ttft_ns = 0
    headers = {"X-Isthmus-Route": route} if route else {}
    timeout = httpx.Timeout(TIMEOUT_S, connect=CONNECT_S)
    began_ns = time.monotonic_ns()
    try:
        with httpx.stream(
            "POST", f"{proxy_url}/v1/chat/completions", json=body, headers=headers, timeout=timeout, trust_env=False
        ) as response:
            for event in _events(response):
                for choice in event["choices"]:
                    if text := choice["delta"].get("content"):
                        ttft_ns = ttft_ns or time.monotonic_ns() - began_ns
                        pieces.append(text)
                        on_text(text)
                usage = event.get("usage") or usage
                ledger = event.get("isthmus") or ledger
    except httpx.HTTPError as error:
        raise LinkError(f"no answer from {proxy_url}: {error or type(error).__name__}") from error
    return Answer(
        text="".join(pieces),
        completion_tokens=usage.get("completion_tokens", 0),
        ttft_ns=ttft_ns,
        total_ns=time.monotonic_ns() - began_ns,
        ledger=ledger,
    )


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The stream's JSON objects up to ``[DONE]`` (server-sent events with one ``data:`` line each)."""
    if not response.is_success:
        raise EngineError(f"the proxy answered {response.status_code}: {response.read().decode(errors='replace')}")
    for line in response.iter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event: dict[str, Any] = msgspec.json.decode(data)
        if "error" in event:
            raise EngineError(f"the request failed: {event['error'].get('message', event['error'])}")
        yield event
    raise EngineError("the stream ended before [DONE]")
