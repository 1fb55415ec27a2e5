"""Whoever has not the right key gets no word out of a real worker, on either control socket."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
import zmq
from zmq.utils.monitor import parse_monitor_message

from tests.cpu_decode.serving import Running
from transfer.codecs import CODECS
from transfer.keys import ClientKeys, secure_client
from transfer.messages import (
    Hello,
    Ping,
    SenderHello,
    SenderWelcome,
    Welcome,
    decode_from_receiver,
    decode_from_worker,
    encode,
)

SILENCE_MS = 300
ANSWER_MS = 20_000


def ask(port: int, client: ClientKeys | None, timeout_ms: int, *messages: bytes) -> bytes | None:
    """The first answer to ``messages``, or None."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        if client is not None:
            secure_client(dealer, client)
        dealer.connect(f"tcp://127.0.0.1:{port}")
        for message in messages:
            dealer.send(message)
        return dealer.recv() if dealer.poll(timeout_ms) else None


@pytest.fixture(scope="module")
def kv_port(running: Running) -> int:
    welcome = running.client.ask(Hello())
    assert isinstance(welcome, Welcome)
    port = urlsplit(welcome.kv_endpoint).port
    assert port
    return port


@pytest.fixture(scope="module")
def sender_hello(running: Running) -> bytes:
    return encode(SenderHello(geometry=running.geometry, codecs=tuple(CODECS)))


def test_each_role_is_answered_at_its_own_socket(running: Running, kv_port: int, sender_hello: bytes) -> None:
    answer = ask(running.worker.control_port, running.proxy_keys, ANSWER_MS, encode(Hello()))
    assert isinstance(decode_from_worker(answer), Welcome)
    answer = ask(kv_port, running.prefill_keys, ANSWER_MS, sender_hello)
    welcome = decode_from_receiver(answer)
    assert isinstance(welcome, SenderWelcome)
    assert (welcome.seal, len(welcome.key)) == ("aes-gcm", 16)


@pytest.mark.parametrize("stranger", ["other role", "unknown key", "other server", "no curve"])
def test_nobody_else_is(stranger: str, running: Running, kv_port: int, sender_hello: bytes) -> None:
    for port, right, other, hello in (
        (running.worker.control_port, running.proxy_keys, running.prefill_keys, encode(Hello())),
        (kv_port, running.prefill_keys, running.proxy_keys, sender_hello),
    ):
        client = {
            "other role": other,
            "unknown key": ClientKeys(*zmq.curve_keypair(), right.server),
            "other server": right._replace(server=zmq.curve_keypair()[0]),
            "no curve": None,
        }[stranger]
        assert ask(port, client, SILENCE_MS, hello, encode(Ping())) is None
    assert running.client.status().worker == running.worker.name


def test_the_frames_socket_is_closed_to_addresses_that_have_shown_no_key(
    running: Running, kv_port: int, sender_hello: bytes
) -> None:
    frames_port = decode_from_receiver(ask(kv_port, running.prefill_keys, ANSWER_MS, sender_hello)).frames_port
    with zmq.Context() as context:
        for source, welcome in (("127.0.0.1", True), ("127.0.0.2", False)):
            push = context.socket(zmq.PUSH)
            push.linger = 0
            monitor = push.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
            push.connect(f"tcp://{source}:0;127.0.0.1:{frames_port}")
            assert monitor.poll(ANSWER_MS)
            event = parse_monitor_message(monitor.recv_multipart())["event"]
            assert (event == zmq.EVENT_HANDSHAKE_SUCCEEDED) is welcome
            push.disable_monitor()
            monitor.close(linger=0)
            push.close()
    assert running.client.status().worker == running.worker.name
