"""The real ``vllm bench serve`` against a server that answers, and one that stops half way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from isthmus.pair import default_pair
from measurements.load_generator import Ask, Generator, Target
from transfer.errors import EngineError

pytest.importorskip("vllm")

GAP_S = 0.02


class Server(ThreadingHTTPServer):
    """Streams completions; from request ``stops_at`` on they end after two tokens, in order or with a broken line."""

    asked: list[tuple[dict, dict]]
    stops_at = 1 << 30
    breaks = False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            self.send_error(404)
            return
        stops = len(self.server.asked) >= self.server.stops_at
        self.server.asked.append((dict(self.headers), body))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(2 if stops else body["max_tokens"]):
            time.sleep(GAP_S)
            self._event({"choices": [{"index": 0, "text": " word"}]})
        if stops and self.server.breaks:
            self.close_connection = True
            return
        if not stops:
            usage = {"prompt_tokens": 8, "completion_tokens": body["max_tokens"]}
            self._event({"choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, event: dict) -> None:
        self._chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    with Generator(tmp_path_factory.mktemp("generator") / "log") as generator:
        yield generator


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def target(server: Server) -> Target:
    return Target(f"http://127.0.0.1:{server.server_port}", "small", default_pair().hf_dir)


@pytest.mark.timeout(300)
def test_what_is_asked_is_asked_and_timed(generator: Generator, server: Server, tmp_path: Path) -> None:
    ask = Ask(
        requests=4,
        concurrency=2,
        prompt_tokens=40,
        output_tokens=5,
        shared_tokens=30,
        seed=7,
        headers=("X-Isthmus-Route=split", "X-Isthmus-Codec=q8"),
    )
    requests = generator.run(target(server), ask, tmp_path / "run.json", deadline_s=60)
    assert len(requests) == len(server.asked) == 4
    for request in requests:
        assert request.output_tokens == 5
        assert GAP_S <= request.ttft_s < request.e2e_s
        assert len(request.itl_s) == 4
    prompts = [body["prompt"] for _, body in server.asked]
    assert len(set(prompts)) == 4
    assert len({prompt[:60] for prompt in prompts}) == 1
    for headers, body in server.asked:
        assert (headers["X-Isthmus-Route"], headers["X-Isthmus-Codec"]) == ("split", "q8")
        asked = (body["model"], body["max_tokens"], body["temperature"], body["ignore_eos"], body["stream"])
        assert asked == ("small", 5, 0, True, True)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("breaks", [False, True], ids=["in order", "broken off"])
def test_a_server_that_stops_half_way_is_no_result(
    generator: Generator, server: Server, tmp_path: Path, breaks: bool
) -> None:
    server.stops_at, server.breaks = 2, breaks
    ask = Ask(requests=3, concurrency=1, prompt_tokens=8, output_tokens=5)
    with pytest.raises(EngineError, match="1 of 3 requests failed" if breaks else "ended after 2 of 5 tokens"):
        generator.run(target(server), ask, tmp_path / "run.json", deadline_s=60)
    # The process is as good as before.
    server.stops_at = 1 << 30
    assert len(generator.run(target(server), ask, tmp_path / "run.json", deadline_s=60)) == 3
