"""Keys on the proxy's way to a decode worker, over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from proxy.decode_node import DecodeNode
from transfer import keys
from transfer.doorkeeper import Doorkeeper

DEADLINE_S = 10.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys.make(tmp_path)
    return tmp_path


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as context:
        yield context


@pytest.fixture
def sealed(folder: Path, context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[tuple[zmq.Socket[bytes], str]]:
    """A worker's socket that lets proxies of ``folder`` in, and its address."""
    doorkeeper = Doorkeeper(context, keys.server(folder))
    try:
        with context.socket(zmq.ROUTER) as router:
            keys.secure_server(router, keys.server(folder), "proxy")
            yield router, f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"
    finally:
        doorkeeper.close()


async def reason_of_failure(node: DecodeNode) -> str:
    """Why the node's first session ended."""
    before = node.down_reason
    run = asyncio.create_task(node.run())
    try:
        async with asyncio.timeout(DEADLINE_S):
            while node.down_reason == before:
                await asyncio.sleep(0.01)
        return node.down_reason
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)


@pytest.mark.parametrize(
    ("role", "reason"), [("prefill", "does not let this proxy's key in"), ("proxy", "handshake"), (None, "handshake")]
)
def test_a_refusal_is_told_from_a_worker_that_is_away(
    role: keys.Role | None, reason: str, folder: Path, sealed: tuple[zmq.Socket[bytes], str]
) -> None:
    """A key that is not allowed; another server's key; no keys."""
    router, endpoint = sealed
    client = keys.client(folder, role) if role else None
    if client is not None and role == "proxy":
        client = client._replace(server=zmq.curve_keypair()[0])
    assert reason in asyncio.run(reason_of_failure(DecodeNode(endpoint, client)))
    assert not router.poll(0)


def test_a_refusal_that_is_there_before_the_first_word_is_told_as_well(
    sealed: tuple[zmq.Socket[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = DecodeNode._read

    async def late(self: DecodeNode, socket: zmq.asyncio.Socket) -> None:
        # Nothing else may run in this loop meanwhile.
        time.sleep(0.5)
        await read(self, socket)

    monkeypatch.setattr(DecodeNode, "_read", late)
    assert "handshake" in asyncio.run(reason_of_failure(DecodeNode(sealed[1])))


def test_a_worker_without_keys_is_not_spoken_to(folder: Path, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        node = DecodeNode(f"tcp://127.0.0.1:{port}", keys.client(folder, "proxy"))
        assert "handshake" in asyncio.run(reason_of_failure(node))
        assert not router.poll(0)
