from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq

from isthmus.up import Stack, _Probes, cluster_on_free_ports, with_keys
from transfer import keys
from transfer.config import Cluster, Pair
from transfer.doorkeeper import Doorkeeper
from transfer.errors import EngineError
from transfer.messages import Failure, Message, Ping, Status, decode_to_worker, encode

PAIR = Pair(name="m", hf_dir="/nowhere/hf", gguf="/nowhere/m.gguf")
STATUS = Status(
    worker="w",
    used_cells=0,
    num_cells=1,
    running_sequences=0,
    reserved_sequences=0,
    max_sequences=1,
    landing_bytes=0,
    prefill_tokens_per_s=1.0,
    prefill_basis="none",
)


@contextmanager
def http(port: int, status: int, body: bytes) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def worker(port: int, answer: Message, folder: Path | None = None) -> Iterator[None]:
    """Answers every Ping with ``answer``; those of proxies whose keys are in ``folder``, if there is one."""
    with zmq.Context() as context, ExitStack() as exits, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        if folder is not None:
            # Closed after the socket, before the context.
            exits.callback(Doorkeeper(context, keys.server(folder)).close)
            keys.secure_server(router, keys.server(folder), "proxy")
        router.bind(f"tcp://127.0.0.1:{port}")
        stopped = threading.Event()

        def serve() -> None:
            while not stopped.is_set():
                if router.poll(20):
                    peer, data = router.recv_multipart()
                    if isinstance(decode_to_worker(data), Ping):
                        router.send_multipart([peer, encode(answer)])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()


@pytest.fixture
def cluster() -> Cluster:
    return cluster_on_free_ports(PAIR)


@pytest.fixture
def probes(cluster: Cluster) -> Iterator[_Probes]:
    with _Probes(cluster) as probes:
        yield probes


def test_ports_differ(cluster: Cluster) -> None:
    decode = cluster.decode
    ports = {cluster.prefill.port, decode.control_port, decode.kv_port, decode.kv_control_port, cluster.proxy.port}
    assert len(ports) == 5


def test_nobody_there_is_not_healthy(probes: _Probes) -> None:
    assert not probes.prefill()
    assert not probes.decode()
    assert not probes.proxy()


def test_prefill_is_healthy_when_vllm_says_so(cluster: Cluster, probes: _Probes) -> None:
    with http(cluster.prefill.port, 503, b""):
        assert not probes.prefill()
    with http(cluster.prefill.port, 200, b""):
        assert probes.prefill()


def test_decode_is_healthy_when_it_tells_its_status(cluster: Cluster, probes: _Probes) -> None:
    with worker(cluster.decode.control_port, STATUS):
        assert probes.decode()


def test_decode_is_not_healthy_when_it_refuses(cluster: Cluster, probes: _Probes) -> None:
    with worker(cluster.decode.control_port, Failure(code="engine_error", message="still loading")):
        assert not probes.decode()


def test_decode_is_asked_with_the_proxys_key(cluster: Cluster, tmp_path: Path) -> None:
    keys.make(tmp_path)
    with worker(cluster.decode.control_port, STATUS, tmp_path):
        with _Probes(cluster) as keyless:
            assert not keyless.decode()
        with _Probes(with_keys(cluster, tmp_path)) as probes:
            assert probes.decode()


def test_a_stack_without_keys_gets_some_and_one_with_keys_keeps_them(cluster: Cluster, tmp_path: Path) -> None:
    made = with_keys(cluster, tmp_path / "keys")
    assert made.keys.dir == str(tmp_path / "keys")
    assert keys.client(tmp_path / "keys", "proxy")
    assert with_keys(made, tmp_path / "more") == made
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize(
    ("body", "healthy"),
    [
        ({"status": "ok", "prefill": "up", "decode": "up"}, True),
        ({"status": "ok", "prefill": "up", "decode": "down"}, False),
        ({"status": "ok"}, False),
    ],
)
def test_the_proxy_is_healthy_with_both_nodes(
    body: dict[str, str], healthy: bool, cluster: Cluster, probes: _Probes
) -> None:
    with http(cluster.proxy.port, 200, msgspec.json.encode(body)):
        assert probes.proxy() is healthy


def test_a_node_that_dies_is_reported_with_what_it_said(cluster: Cluster, tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    with (
        pytest.raises(EngineError, match=r"(?s)(prefill|decode|proxy) died with exit code 2.*does not exist"),
        Stack(cluster, tmp_path),
    ):
        pytest.fail("the stack came up without a model")
    assert set(psutil.Process().children(recursive=True)) <= before
