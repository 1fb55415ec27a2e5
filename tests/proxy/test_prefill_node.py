"""The client to vLLM, against a socket that says exactly these bytes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

import pytest

from proxy.prefill_node import PrefillNode
from proxy.vllm_answers import Counts, Delta
from transfer.errors import EngineError, LinkError
from transfer.messages import Sampling

# Longer than any buffer that a line might have to fit into.
LONG = "w" * 300_000
EVENTS = [
    ": keep-alive",
    "data: " + json.dumps({"choices": [{"index": 0, "text": LONG, "token_ids": [7]}]}),
    "data: " + json.dumps({"choices": [{"index": 0, "text": " end", "finish_reason": "length", "token_ids": [8]}]}),
    "data: " + json.dumps({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}),
    "data: [DONE]",
]


def answer(separator: str) -> bytes:
    return "".join(event + separator for event in EVENTS).encode()


async def ask(pieces: Sequence[bytes]) -> list[Delta | Counts]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        node = PrefillNode(f"{host}:{port}", "tiny", 1)
        heartbeat = asyncio.create_task(node.run())
        try:
            return [each async for each in node.stream("r", [1, 2, 3], Sampling(max_tokens=2))]
        finally:
            heartbeat.cancel()
            await asyncio.gather(heartbeat, return_exceptions=True)


@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n"])
@pytest.mark.parametrize("piece_bytes", [11, 65_536, 1 << 20])
def test_events_may_be_long_and_cut_anywhere(separator: str, piece_bytes: int):
    said = answer(separator)
    # The long text in large pieces, or it takes all day.
    cuts = [0, *range(300_000, len(said), piece_bytes), len(said)]
    pieces = [said[start:end] for start, end in pairwise(cuts)]
    first, second, counts = asyncio.run(ask(pieces))
    assert first == Delta(LONG, None, 0, (7,))
    assert second == Delta(" end", "length", 0, (8,))
    assert counts == Counts(2, 0)


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@pytest.mark.parametrize(("ended", "connections"), [(True, 1), (False, 2)], ids=["to its end", "left open"])
def test_a_connection_serves_again_where_a_stream_ends(ended: bool, connections: int):
    asked = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                if length := re.search(r"content-length: (\d+)", head):
                    await reader.readexactly(int(length[1]))
                    asked.add(writer)
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                writer.write(chunk(answer("\n\n")) + (b"0\r\n\r\n" if ended else b""))
        writer.close()

    async def ask_twice() -> list[list[Delta | Counts]]:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            node = PrefillNode(f"{host}:{port}", "tiny", 1)
            heartbeat = asyncio.create_task(node.run())
            try:
                return [[each async for each in node.stream("r", [1, 2, 3], Sampling(max_tokens=2))] for _ in range(2)]
            finally:
                heartbeat.cancel()
                await asyncio.gather(heartbeat, return_exceptions=True)

    first, second = asyncio.run(ask_twice())
    assert first == second
    assert first[-1] == Counts(2, 0)
    assert len(asked) == connections


def test_a_stream_that_ends_early_is_no_answer():
    said = answer("\n\n")
    with pytest.raises(EngineError, match="ended before"):
        asyncio.run(ask([said[: said.index(b" end")]]))


def test_nobody_listens():
    node = PrefillNode("127.0.0.1:9", "tiny", 1)

    async def stream() -> None:
        async for _ in node.stream("r", [1], Sampling(max_tokens=1)):
            pass

    async def closed() -> None:
        try:
            await stream()
        finally:
            await node._http.close()

    with pytest.raises(LinkError, match=r"prefill node at http://127.0.0.1:9 failed: .*127.0.0.1"):
        asyncio.run(closed())
