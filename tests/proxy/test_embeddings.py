"""Embeddings, which a whole engine makes: here one that says what it was asked, or fails as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from proxy import embeddings
from tests.proxy.conftest import Stack, free_port, hf_dir, make_cluster, running, wait_until  # noqa: F401 - a fixture
from tests.proxy.test_failures import error_of

MADE = {"object": "list", "data": [{"index": 0, "embedding": [0.5, -0.5]}], "usage": {"total_tokens": 3}}


class Engine(BaseHTTPRequestHandler):
    asked: ClassVar[list[Any]] = []
    status, answer = 200, json.dumps(MADE).encode()
    may_answer = threading.Event()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, dict(self.headers), json.loads(body)))
        self.may_answer.wait(20)
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def stack(hf_dir: Path) -> Iterator[Stack]:  # noqa: F811
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/"
        with running(make_cluster(hf_dir, embeddings_url=url)) as up:
            yield up
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "asked", [])
    Engine.may_answer.set()


def ask(stack: Stack, **fields: Any) -> Any:
    return stack.http.post("/v1/embeddings", json={"model": "bge", **fields}, headers={"Authorization": "Bearer mine"})


@pytest.mark.parametrize("given", ["one", ["one", "two"], [1, 2, 3], [[1, 2], [3]]])
def test_the_engine_gets_all_of_it_but_the_key(stack: Stack, given: Any) -> None:
    answer = ask(stack, input=given, dimensions=2, encoding_format="float")
    assert (answer.status_code, answer.json()) == (200, MADE)
    ((path, headers, body),) = Engine.asked
    assert path == "/v1/embeddings"
    assert "Authorization" not in headers
    several = isinstance(given, list) and not isinstance(given[0], int)
    assert body == {
        "model": "bge",
        "input": given if several else [given],
        "dimensions": 2,
        "encoding_format": "float",
    }


@pytest.mark.parametrize("fields", [{}, {"input": []}, {"input": 3}, {"input": ["a", 1.5]}])
def test_an_input_that_is_none_is_refused_here(stack: Stack, fields: dict[str, Any]) -> None:
    assert error_of(ask(stack, **fields), 400)["param"] == "input"
    assert Engine.asked == []


def test_what_the_engine_says_of_a_request_is_passed_on(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "status", 404)
    monkeypatch.setattr(Engine, "answer", b'{"error": {"message": "no such model"}}')
    answer = ask(stack, input="a")
    assert (answer.status_code, answer.json()) == (404, {"error": {"message": "no such model"}})


def test_an_engine_that_fails(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "status", 500)
    assert "status 500" in error_of(ask(stack, input="a"), 502)["message"]


def test_an_answer_without_end(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "MAX_ANSWER_BYTES", 10)
    error_of(ask(stack, input="a"), 502)


def test_an_engine_that_is_gone(hf_dir: Path) -> None:  # noqa: F811
    with running(make_cluster(hf_dir, embeddings_url=f"http://127.0.0.1:{free_port()}")) as stack:
        assert "does not answer" in error_of(ask(stack, input="a"), 503)["message"]


def test_no_more_at_once_than_other_requests(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "may_answer", threading.Event())
    most = stack.gateway.cluster.proxy.max_running
    with ThreadPoolExecutor(most) as pool:
        running = [pool.submit(ask, stack, input="a") for _ in range(most)]
        wait_until(lambda: len(Engine.asked) == most)
        error_of(ask(stack, input="a"), 503)
        Engine.may_answer.set()
        assert [each.result().status_code for each in running] == [200] * most
    assert ask(stack, input="a").status_code == 200
