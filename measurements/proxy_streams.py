"""Many streams that say little, and one reader that does not read: what the others notice."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator

import httpx

from measurements.proxy_fixed import FLOOD_SEED, FixedStack
from measurements.proxy_summary import PROXIED, Sample

IDLE_GAP_MS = 500
BESIDE_GAP_MS = 20
BESIDE_STREAMS = 8
ROUNDS = 2
_FLOOD_TOKENS = 500_000
# Long enough for every buffer between the engine and a reader that does not read to fill.
_FILL_S = 2.0
_RECEIVE_BUFFER_BYTES = 4096


def measure(stack: FixedStack, idle_streams: int, idle_seconds: float) -> Iterator[Sample]:
    """First ``idle_streams`` at two tokens a second; then a few faster ones, alone and beside a reader that stalls."""
    gaps_ms, errors = asyncio.run(_streams(stack, idle_streams, IDLE_GAP_MS, idle_seconds))
    late_ms = [round(gap_ms - IDLE_GAP_MS, 2) for gap_ms in gaps_ms]
    yield {"part": "idle", "streams": idle_streams, "errors": errors, "late_ms": late_ms}
    for turn in range(ROUNDS):
        for beside in (True, False) if turn % 2 else (False, True):
            gaps_ms, errors = asyncio.run(_beside(stack, idle_seconds / 2, stalled=beside))
            yield {
                "part": "slow reader",
                "beside": beside,
                "round": turn,
                "errors": errors,
                "gaps_ms": [round(gap_ms, 2) for gap_ms in gaps_ms],
            }


async def _beside(stack: FixedStack, seconds: float, *, stalled: bool) -> tuple[list[float], int]:
    if not stalled:
        return await _streams(stack, BESIDE_STREAMS, BESIDE_GAP_MS, seconds)
    address = httpx.URL(stack.urls[PROXIED])
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        reader.connect((address.host, address.port))
        body = json.dumps(_body(stack, FLOOD_SEED, _FLOOD_TOKENS)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.host}\r\nContent-Length: {len(body)}\r\n\r\n"
        reader.sendall(head.encode() + body)
        await asyncio.sleep(_FILL_S)
        return await _streams(stack, BESIDE_STREAMS, BESIDE_GAP_MS, seconds)


async def _streams(stack: FixedStack, count: int, gap_ms: int, seconds: float) -> tuple[list[float], int]:
    """The gaps between tokens in ``count`` streams, which begin spread over one gap, and how many failed."""
    num_tokens = max(2, round(seconds * 1e3 / gap_ms))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=stack.urls[PROXIED], timeout=seconds + 30, limits=limits, trust_env=False
    ) as http:

        async def one(number: int) -> list[float]:
            await asyncio.sleep(number / count * gap_ms / 1e3)
            return await _gaps(http, _body(stack, gap_ms, num_tokens))

        found = await asyncio.gather(*(one(number) for number in range(count)), return_exceptions=True)
    whole = [gaps_ms for gaps_ms in found if isinstance(gaps_ms, list) and len(gaps_ms) == num_tokens - 1]
    return [gap for gaps_ms in whole for gap in gaps_ms], count - len(whole)


async def _gaps(http: httpx.AsyncClient, body: dict[str, object]) -> list[float]:
    gaps_ms: list[float] = []
    last_ns = 0
    async with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and '"text":" word"' in line:
                now_ns = time.monotonic_ns()
                if last_ns:
                    gaps_ms.append((now_ns - last_ns) / 1e6)
                last_ns = now_ns
    return gaps_ms


def _body(stack: FixedStack, gap_ms: int, num_tokens: int) -> dict[str, object]:
    return {
        "model": stack.model,
        "prompt": [100, 101, 102],
        "max_tokens": num_tokens,
        "seed": gap_ms,
        "stream": True,
    }
