"""Real sockets: what a worker's two threads may do to one of them at once."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import zmq

from cpu_decode.clients import MESSAGES_PER_TURN, Clients
from transfer.config import Decode
from transfer.messages import Failure, Ping, decode_from_worker, encode

WAIT_MS = 10_000


class Peers(NamedTuple):
    clients: Clients
    woken: list[None]
    client: zmq.Socket[bytes]

    def arrives(self) -> bool:
        """Whether something comes to the worker's socket within a while."""
        poller = select.poll()
        poller.register(self.clients.descriptor, select.POLLIN)
        return bool(poller.poll(WAIT_MS))

    def name(self) -> bytes:
        """Have the worker hear of the client; returns how it calls it."""
        self.client.send(encode(Ping()))
        heard: list[tuple[bytes, list[bytes]]] = []
        while not heard:
            assert self.arrives()
            heard = list(self.clients.heard())
        ((name, parts),) = heard
        assert parts == [encode(Ping())]
        return name


@pytest.fixture
def peers() -> Iterator[Peers]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    woken: list[None] = []
    clients = Clients(context, Decode(host="127.0.0.1", control_port=0), None, lambda: woken.append(None))
    client = context.socket(zmq.DEALER)
    client.rcvtimeo = WAIT_MS
    client.connect(f"tcp://127.0.0.1:{clients.port}")
    yield Peers(clients, woken, client)
    clients.close()
    client.close(linger=0)
    context.term()


def failure(request_id: str) -> Failure:
    return Failure(code="engine_error", message="x", request_id=request_id)


@pytest.mark.parametrize("reached", [True, False])
def test_a_message_that_a_send_has_noticed_is_looked_for(peers, reached):
    name = peers.name()
    peers.woken.clear()
    peers.client.send(b"second")
    assert peers.arrives()
    # As the engine's thread does, before the I/O thread has looked.
    assert peers.clients.send(name if reached else b"nobody", [failure("a")]) == reached
    assert peers.woken
    assert list(peers.clients.heard()) == [(name, [b"second"])]


def test_a_send_with_nothing_to_hear_wakes_nobody(peers):
    name = peers.name()
    peers.woken.clear()
    assert peers.clients.send(name, [failure("a")])
    assert not peers.woken


def test_what_is_left_for_the_next_turn_is_looked_for(peers):
    name = peers.name()
    peers.woken.clear()
    for _ in range(MESSAGES_PER_TURN + 1):
        peers.client.send(b"more")
    heard: list[object] = []
    turns = 0
    while len(heard) <= MESSAGES_PER_TURN:
        assert peers.woken or peers.arrives()
        peers.woken.clear()
        heard += peers.clients.heard()
        turns += 1
    assert heard == [(name, [b"more"])] * (MESSAGES_PER_TURN + 1)
    assert turns > 1


def test_messages_of_two_threads_stay_whole(peers):
    name = peers.name()

    def talk(thread: int) -> None:
        for number in range(300):
            assert peers.clients.send(name, [failure(f"{thread}-{number}-{part}") for part in range(3)])

    threads = [threading.Thread(target=talk, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    next_of = [0, 0]
    for _ in range(600):
        ids = [decode_from_worker(part).request_id for part in peers.client.recv_multipart()]
        thread = int(ids[0][0])
        assert ids == [f"{thread}-{next_of[thread]}-{part}" for part in range(3)]
        next_of[thread] += 1
    for each in threads:
        each.join()
    assert next_of == [300, 300]


def test_who_is_gone_cannot_be_told(peers):
    assert not peers.clients.send(b"nobody", [failure("a")])
