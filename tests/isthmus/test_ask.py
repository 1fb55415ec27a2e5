"""Against a small real HTTP server that says what it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from isthmus.ask import ask, request_body
from transfer.errors import EngineError, LinkError


class Server:
    def __init__(self) -> None:
        self.status = 200
        self.body = b""
        self.seen: list[tuple[str, dict[str, str], dict[str, object]]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.seen.append((self.path, dict(self.headers), sent))
                self.send_response(owner.status)
                self.end_headers()
                self.wfile.write(owner.body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def stream(*events: object) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


def delta(**fields: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}], "usage": None}


BODY = request_body("m", "why?", max_tokens=3)


def test_text_counts_and_ledger_are_collected(server: Server) -> None:
    server.body = (
        stream(
            delta(role="assistant", content=""),
            delta(content="Hé"),
            delta(content="llo"),
            {"choices": [], "usage": {"completion_tokens": 3}, "isthmus": {"route": "split"}},
        )
        + b"data: [DONE]\n\n"
    )
    heard: list[str] = []
    answer = ask(server.url, BODY, route="split", on_text=heard.append)
    assert heard == ["Hé", "llo"]
    assert (answer.text, answer.completion_tokens, answer.ledger) == ("Héllo", 3, {"route": "split"})
    assert 0 < answer.ttft_ns <= answer.total_ns
    path, headers, sent = server.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["X-Isthmus-Route"] == "split"
    assert sent["isthmus"] is True
    assert sent["temperature"] == 0
    assert "ignore_eos" not in sent


def test_no_route_means_no_header(server: Server) -> None:
    server.body = b"data: [DONE]\n\n"
    ask(server.url, BODY, route=None, on_text=str)
    assert "X-Isthmus-Route" not in server.seen[0][1]


def test_a_refusal_carries_status_and_body(server: Server) -> None:
    server.status, server.body = 503, b'{"error": {"message": "no cells"}}'
    with pytest.raises(EngineError, match=r"503.*no cells"):
        ask(server.url, BODY, route=None, on_text=str)


def test_an_error_inside_the_stream_is_raised(server: Server) -> None:
    server.body = stream(delta(content="a"), {"error": {"message": "the decode node was lost"}})
    with pytest.raises(EngineError, match="the decode node was lost"):
        ask(server.url, BODY, route=None, on_text=str)


def test_a_stream_that_stops_early_is_an_error(server: Server) -> None:
    server.body = stream(delta(content="a"))
    with pytest.raises(EngineError, match="ended before"):
        ask(server.url, BODY, route=None, on_text=str)


def test_nobody_there_is_a_link_error() -> None:
    with pytest.raises(LinkError, match=r"no answer from http://127\.0\.0\.1:1"):
        ask("http://127.0.0.1:1", BODY, route=None, on_text=str)
