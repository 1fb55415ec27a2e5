"""Real sockets: who gets an answer from a secured one."""

from __future__ import annotations

import random
import secrets
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq
from structlog.testing import capture_logs

from transfer import doorkeeper, keys
from transfer.doorkeeper import Doorkeeper
from transfer.keys import ClientKeys, secure_client, secure_server

# An answer over loopback takes a millisecond; a refused peer is believed after this long.
SILENCE_MS = 300
ANSWER_MS = 10_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    keys.make(folder, ("prefill-2",))
    return folder


class Echo:
    """A secured ROUTER that gives back what it hears."""

    def __init__(self, folder: Path, role: keys.Role) -> None:
        self._context = zmq.Context()
        server = keys.server(folder)
        self.doorkeeper = Doorkeeper(self._context, server)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger = 0
        secure_server(self._router, server, role)
        self.port = self._router.bind_to_random_port("tcp://127.0.0.1")
        self.doorkeeper.watch(self._router)
        self.heard: list[bytes] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stopped.is_set():
            if self._router.poll(20):
                peer, data = self._router.recv_multipart()
                self.heard.append(data)
                self._router.send_multipart([peer, data])

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._router.close()
        self.doorkeeper.close()
        self._context.term()


@pytest.fixture
def proxy_door(folder: Path) -> Iterator[Echo]:
    """Refusals are counted and logged afresh."""
    echo = Echo(folder, "proxy")
    yield echo
    echo.close()


@contextmanager
def asking(port: int, client: ClientKeys | None) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        # Who is refused does not try again, so that refusals can be counted.
        dealer.reconnect_ivl = -1
        # Nor can it say anything once it is refused.
        dealer.sndtimeo = SILENCE_MS
        if client is not None:
            secure_client(dealer, client)
        dealer.connect(f"tcp://127.0.0.1:{port}")
        yield dealer


def answered(port: int, client: ClientKeys | None, timeout_ms: int) -> bool:
    question = secrets.token_bytes(8)
    with asking(port, client) as dealer:
        try:
            dealer.send(question)
        except zmq.Again:
            return False
        return bool(dealer.poll(timeout_ms)) and dealer.recv() == question


def test_a_known_client_is_answered(proxy_door: Echo, folder: Path) -> None:
    assert answered(proxy_door.port, keys.client(folder, "proxy"), ANSWER_MS)
    assert proxy_door.doorkeeper.refused == 0


def test_every_holder_of_a_role_is_answered(folder: Path, tmp_path: Path) -> None:
    for name in ("decode.key", "prefill-2.key_secret"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "prefill-2.key_secret").chmod(0o600)
    door = Echo(folder, "prefill")
    try:
        assert answered(door.port, keys.client(tmp_path, "prefill"), ANSWER_MS)
    finally:
        door.close()


def test_a_key_counts_from_when_it_is_put_into_the_folder_until_it_is_taken_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorkeeper, "READ_EVERY_S", 0.0)
    keys.make(tmp_path)
    newcomer = keys.client(folder, "proxy")._replace(server=keys.client(tmp_path, "proxy").server)
    door = Echo(tmp_path, "proxy")
    try:
        assert not answered(door.port, newcomer, SILENCE_MS)
        shutil.copy(folder / "proxy.key", tmp_path / "proxy-new.key")
        assert answered(door.port, newcomer, ANSWER_MS)
        (tmp_path / "proxy-new.key").unlink()
        assert not answered(door.port, newcomer, SILENCE_MS)
    finally:
        door.close()


def test_a_folder_that_cannot_be_read_any_more_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorkeeper, "READ_EVERY_S", 0.0)
    keys.make(tmp_path / "keys")
    client = keys.client(tmp_path / "keys", "proxy")
    door = Echo(tmp_path / "keys", "proxy")
    try:
        shutil.rmtree(tmp_path / "keys")
        with capture_logs() as logs:
            assert answered(door.port, client, ANSWER_MS)
        assert "the allowed keys cannot be read again" in {entry["event"] for entry in logs}
    finally:
        door.close()


def unknown(folder: Path) -> ClientKeys:
    return ClientKeys(*zmq.curve_keypair(), keys.client(folder, "proxy").server)


def wrong_role(folder: Path) -> ClientKeys:
    return keys.client(folder, "prefill")


def wrong_server(folder: Path) -> ClientKeys:
    return keys.client(folder, "proxy")._replace(server=zmq.curve_keypair()[0])


def stolen_public_key(folder: Path) -> ClientKeys:
    return keys.client(folder, "proxy")._replace(secret=zmq.curve_keypair()[1])


def no_curve(_folder: Path) -> None:
    return None


@pytest.mark.parametrize(
    ("stranger", "logged"),
    [
        (unknown, {"holder": "unknown", "address": "127.0.0.1"}),
        (wrong_role, {"holder": "prefill", "address": "127.0.0.1"}),
        (wrong_server, {"reason": "it does not speak CURVE with our key"}),
        (stolen_public_key, {"reason": "it does not speak CURVE with our key"}),
        (no_curve, {"reason": "it does not speak CURVE with our key"}),
    ],
)
def test_a_stranger_gets_no_answer_and_is_logged(stranger, logged, proxy_door: Echo, folder: Path) -> None:
    with capture_logs() as logs:
        assert not answered(proxy_door.port, stranger(folder), SILENCE_MS)
        assert answered(proxy_door.port, keys.client(folder, "proxy"), ANSWER_MS)
    assert len(proxy_door.heard) == 1
    assert proxy_door.doorkeeper.refused > 0
    assert logs[0]["event"] == "turned a peer away"
    assert logs[0]["log_level"] == "warning"
    assert logs[0] | logged == logs[0]


def test_a_refused_key_is_named_as_in_its_file(proxy_door: Echo, folder: Path) -> None:
    with capture_logs() as logs:
        assert not answered(proxy_door.port, keys.client(folder, "prefill"), SILENCE_MS)
    assert logs[0]["key"].encode() == keys.client(folder, "prefill").public


def test_a_flood_of_refusals_is_logged_about_once_a_second(proxy_door: Echo, folder: Path) -> None:
    with capture_logs() as logs:
        for _ in range(8):
            assert not answered(proxy_door.port, unknown(folder), 50)
        assert answered(proxy_door.port, keys.client(folder, "proxy"), ANSWER_MS)
    assert proxy_door.doorkeeper.refused == 8
    assert len(logs) < 8


GREETING = b"\xff\0\0\0\0\0\0\0\1\x7f"
RANDOM = random.Random(0).randbytes(4096)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 4096,
        b"\xff" * 4096,
        RANDOM,
        GREETING,
        GREETING + b"\3\0CURVE" + bytes(47),
        GREETING + b"\3\0CURVE" + bytes(47) + b"\4\xc8\5HELLO" + RANDOM,
        GREETING + b"\3\0CURVE" + bytes(47) + b"\6\xff\xff\xff\xff\xff\xff\xff\xff" + RANDOM,
    ],
    ids=["nothing", "http", "zeros", "ones", "random", "greeting", "curve", "forged hello", "endless command"],
)
def test_garbage_gets_no_answer_and_harms_nobody(garbage: bytes, proxy_door: Echo, folder: Path) -> None:
    with socket.create_connection(("127.0.0.1", proxy_door.port), timeout=5) as raw:
        raw.sendall(garbage)
        raw.settimeout(SILENCE_MS / 1000)
        said = b""
        try:
            while more := raw.recv(4096):
                said += more
        except OSError:
            pass  # it keeps silent, or hangs up
        # What every ZeroMQ peer says of itself: signature, version, mechanism; never more.
        assert len(said) <= 64
        assert answered(proxy_door.port, keys.client(folder, "proxy"), ANSWER_MS)
    assert len(proxy_door.heard) == 1


def test_nothing_is_left_when_it_closes(folder: Path) -> None:
    before = set(threading.enumerate())
    door = Echo(folder, "proxy")
    assert answered(door.port, keys.client(folder, "proxy"), ANSWER_MS)
    door.close()
    assert set(threading.enumerate()) == before
