"""Every way to fail, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading

import pytest

from proxy import answer, decode_node, request_body
from proxy.failures import describe
from tests.proxy.conftest import Stack, make_cluster, running, wait_until
from transfer.errors import CapacityError, EngineError, LinkError
from transfer.messages import Abort, Failure, Reserve, Start

CPU = {"X-Isthmus-Route": "cpu"}
SPLIT = {"X-Isthmus-Route": "split"}
GPU = {"X-Isthmus-Route": "gpu"}


def error_of(response, status: int) -> dict[str, object]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", "hi"),
        ("messages", [{"role": "king", "content": "hi"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}]),
        ("messages", [{"role": "user", "content": "refuse"}]),
        ("model", 5),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_completion_tokens", 0),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("stop", 5),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"258": 1}),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("seed", 2**63),
        ("stream", "yes"),
        ("n", 0),
        ("n", 17),
        ("logprobs", 3),
        ("top_logprobs", 2),
        ("top_logprobs", 21),
        ("min_tokens", 1000),
        ("stop_token_ids", [258]),
        ("typical_p", 0),
        ("prompt_logprobs", 21),
        ("functions", [{}]),
    ],
)
def test_a_wrong_field_is_named(stack, field, value):
    error = error_of(stack.chat(**{field: value}), 400)
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [258]),
        ("prompt", ["a", 5]),
        ("prompt", [[1], []]),
        ("prompt", ["a"] * 65),
        ("prompt", [-1]),
        ("prompt", [True]),
        ("suffix", "x"),
        ("best_of", 17),
        ("logprobs", 21),
        ("logprobs", True),
        ("max_tokens", 0),
    ],
)
def test_a_wrong_completion_field_is_named(stack, field, value):
    assert error_of(stack.complete(**{field: value}), 400)["param"] == field


def test_fields_that_mean_nothing_here_are_ignored(stack):
    assert stack.chat(user="me", store=True, metadata={}, tools=[], n=1, logprobs=False, seed=None).status_code == 200
    assert stack.chat(service_tier="auto", prompt_cache_key="a", reasoning_effort="low").status_code == 200


@pytest.mark.parametrize(
    ("headers", "name"),
    [({"X-Isthmus-Route": "moon"}, "X-Isthmus-Route"), ({"X-Isthmus-Codec": "mp3"}, "X-Isthmus-Codec")],
)
def test_a_wrong_header_is_named(stack, headers, name):
    assert error_of(stack.chat(headers), 400)["param"] == name


def test_a_wrong_request_id_is_refused(stack):
    refused = stack.chat({"X-Request-Id": "a b"})
    assert error_of(refused, 400)["param"] == "X-Request-Id"
    assert refused.headers["x-request-id"] != "a b"


@pytest.mark.parametrize("path", ["/v1/audio", "/v1/chat/completions", "/v1/models/none", "/ledger?last=0"])
def test_every_refusal_has_an_id(stack, path):
    assert stack.http.get(path, headers={"X-Request-Id": "mine"}).headers["x-request-id"] == "mine"
    assert len(stack.http.get(path).headers["x-request-id"]) == 32


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b'"x"', b"\xff", b'{"model": "tiny", "messages": NaN}'])
def test_a_body_that_is_no_request(stack, body):
    error_of(stack.http.post("/v1/chat/completions", content=body), 400)


def test_a_body_without_end(stack, monkeypatch):
    monkeypatch.setattr(request_body, "MAX_BODY_BYTES", 100)
    assert error_of(stack.complete(prompt="x" * 200), 413)["code"] == "request_too_large"
    assert error_of(stack.http.post("/tokenize", json={"prompt": "x" * 200}), 413)["code"] == "request_too_large"


def test_unknown_model_path_method_and_query(stack):
    assert error_of(stack.chat(model="gpt-4"), 404)["code"] == "model_not_found"
    assert error_of(stack.http.get("/v1/audio"), 404)["code"] == "not_found"
    no_engine = error_of(stack.http.post("/v1/embeddings", json={"model": "tiny"}), 501)
    assert no_engine["message"].endswith("[proxy] embeddings_url")
    assert error_of(stack.http.get("/v1/chat/completions"), 405)["code"] == "method_not_allowed"
    assert error_of(stack.http.get("/ledger?last=0"), 400)["param"] == "last"


@pytest.mark.parametrize(
    ("route", "fits", "over"), [("split", 190, 199), ("gpu", 190, 199), ("cpu", 290, 299), ("split", 100, 201)]
)
def test_the_context_is_the_routes(stack, route, fits, over):
    headers = {"X-Isthmus-Route": route}
    assert stack.complete(headers, prompt=[5] * fits, max_tokens=10).status_code == 200
    error = error_of(stack.complete(headers, prompt=[5] * over, max_tokens=10), 400)
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("route", ["split", "gpu"])
@pytest.mark.parametrize(("tokens", "fits"), [(1, True), (198, True), (199, True), (200, False), (201, False)])
def test_prompts_around_the_longest_leave_room_for_one_token(stack, route, tokens, fits):
    answer = stack.complete({"X-Isthmus-Route": route}, prompt=[5] * tokens, max_tokens=1)
    if fits:
        assert answer.status_code == 200
    else:
        assert error_of(answer, 400)["code"] == "context_length_exceeded"


def test_both_nodes_down(hf_dir):
    with running(make_cluster(hf_dir), prefill_up=False, decode_up=False) as stack:
        error_of(stack.chat(), 503)
        health = stack.http.get("/health")
        assert health.status_code == 503
        assert health.json().items() >= {"status": "down", "prefill": "down", "decode": "down"}.items()
        assert stack.entries()[0]["status"] == "link_error"


@pytest.mark.parametrize(
    ("code", "status"), [("capacity_exceeded", 503), ("invalid_request", 400), ("engine_error", 502), ("odd", 502)]
)
def test_the_worker_refuses(stack, code, status):
    stack.worker.script.refuse_reserve = Failure(code=code, message="no room")
    assert "no room" in error_of(stack.chat(SPLIT), status)["message"]
    assert not stack.prefill.bodies


def test_the_field_that_the_worker_refuses_is_named(stack):
    stack.worker.script.refuse_reserve = Failure(code="invalid_request", message="no such rule", param="grammar")
    assert error_of(stack.chat(SPLIT), 400)["param"] == "grammar"


def test_a_full_worker_is_asked_again_until_it_has_room(stack):
    stack.worker.script.refuse_reserve = Failure(code="capacity_exceeded", message="no room")
    timer = threading.Timer(0.3, lambda: setattr(stack.worker.script, "refuse_reserve", None))
    timer.start()
    assert stack.chat().status_code == 200
    timer.join()
    assert len(stack.worker.heard(Reserve)) > 2


@pytest.mark.parametrize(("said", "status"), [((400, "bad bias"), 400), ((500, "dead engine"), 502)])
@pytest.mark.parametrize("route", ["split", "gpu"])
def test_vllm_refuses(stack, route, said, status):
    stack.prefill.script.refuse = said
    assert said[1] in error_of(stack.chat({"X-Isthmus-Route": route}), status)["message"]


@pytest.mark.parametrize("export", [{"error": "no ticket"}, {"exported_tokens": 3, "complete": False}])
def test_kv_that_was_not_exported(stack, export):
    stack.prefill.script.export = export
    assert "KV" in error_of(stack.chat(SPLIT), 502)["message"]
    # The answer goes out first, the abort right behind it.
    wait_until(lambda: len(stack.worker.heard(Abort)) == 1)
    assert not stack.worker.heard(Start)


def test_vllm_takes_too_long(stack):
    stack.prefill.script.hang = True
    message = error_of(stack.chat(SPLIT), 503)["message"]
    said = re.search(r"took longer than ([\d.]+) s", message)
    assert said, message
    # What the link's deadline of 2 s has left when vLLM is asked.
    assert 1.5 < float(said[1]) <= 2


def test_kv_that_never_arrives(stack):
    stack.worker.script.silent_after_start = True
    events = stack.chat(SPLIT, stream=True).text.strip().split("\n\n")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "link_error"
    assert "[DONE]" not in events[-1]


def test_a_failure_in_mid_stream_is_its_last_event(stack):
    stack.worker.script.fail_after_texts = 1
    response = stack.chat(SPLIT, stream=True)
    assert response.status_code == 200
    last = response.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "llama.cpp fell over"
    stack.prefill.script.fail_in_stream = True
    assert "out of memory" in stack.chat(GPU, stream=True).text
    assert [entry["status"] for entry in stack.entries()] == ["engine_error", "engine_error"]


@pytest.mark.parametrize("headers", [CPU, GPU])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves(stack: Stack, headers, stream):
    stack.worker.script.endless = stack.prefill.script.endless = True
    body = json.dumps({"model": "tiny", "prompt": "hi", "max_tokens": 150, "stream": stream}).encode()
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with socket.create_connection(("127.0.0.1", stack.gateway.cluster.proxy.port)) as client:
        request = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}Content-Length: {len(body)}\r\n\r\n"
        client.sendall(request.encode() + body)
        if stream:
            assert client.recv(100)
        wait_until(lambda: stack.worker.open or stack.prefill.open)
    wait_until(stack.entries)
    assert stack.entries()[0]["status"] == "cancelled"
    stack.assert_idle()
    assert len(stack.worker.heard(Abort)) == (headers is CPU)


def test_a_client_that_leaves_during_prefill(stack):
    stack.prefill.script.hang = True
    body = json.dumps({"model": "tiny", "prompt": "hi"}).encode()
    with socket.create_connection(("127.0.0.1", stack.gateway.cluster.proxy.port)) as client:
        client.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        )
        wait_until(lambda: stack.prefill.open)
    stack.assert_idle()
    assert len(stack.worker.heard(Abort)) == 1


def test_a_client_that_reads_nothing(stack, monkeypatch):
    monkeypatch.setattr(answer, "STALLED_CLIENT_S", 0.05)
    stack.prefill.script.texts = ["x" * 1_000_000] * 20
    body = json.dumps({"model": "tiny", "prompt": "hi", "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", stack.gateway.cluster.proxy.port)) as client:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Isthmus-Route: gpu\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        client.sendall(head.encode() + body)
        wait_until(stack.entries)
    assert stack.entries()[0]["status"] == "cancelled"


def test_the_worker_dies_in_mid_stream_and_comes_back(hf_dir):
    from tests.proxy.fake_worker import FakeWorker

    with running(make_cluster(hf_dir)) as stack:
        stack.worker.script.endless = True
        body = {"model": "tiny", "prompt": "hi", "stream": True, "max_tokens": 150}
        with stack.http.stream("POST", "/v1/completions", json=body, headers=SPLIT) as response:
            lines = response.iter_lines()
            next(lines)
            stack.worker.close()
            assert any('"link_error"' in line for line in lines)
        stack.worker.open.clear()
        wait_until(lambda: not stack.gateway.workers.pinned.up)
        stack.assert_idle()
        reborn = FakeWorker(stack.gateway.workers.pinned.endpoint)
        try:
            wait_until(lambda: stack.gateway.workers.pinned.up)
            assert stack.chat(CPU).status_code == 200
        finally:
            reborn.close()


def test_a_worker_that_falls_silent_is_down(hf_dir, monkeypatch):
    monkeypatch.setattr(decode_node, "SILENCE_S", 0.3)
    monkeypatch.setattr(decode_node, "HEARTBEAT_S", 0.1)
    with running(make_cluster(hf_dir)) as stack:
        stack.worker.mute()
        error = error_of(stack.chat(CPU), 503)
        assert "no word" in str(error["message"])
        assert not stack.gateway.workers.pinned.up


def test_a_worker_of_another_protocol_stays_down(hf_dir, monkeypatch):
    monkeypatch.setattr(decode_node, "RETRY_S", 0.05)
    with running(make_cluster(hf_dir)) as stack:
        stack.worker.script.protocol = 99
        # A new session meets the new version.
        stack.worker.fail_session()
        wait_until(lambda: "99 there" in stack.gateway.workers.pinned.down_reason)
        assert not stack.gateway.workers.pinned.up


def test_more_requests_than_slots(hf_dir):
    with running(make_cluster(hf_dir, max_running=1, max_queued=1)) as stack:
        stack.worker.script.endless = True

        async def three() -> list[int]:
            import httpx

            body = {"model": "tiny", "prompt": "hi", "max_tokens": 150, "stream": True}
            async with httpx.AsyncClient(base_url=stack.url, timeout=20, trust_env=False) as http:
                first = asyncio.create_task(http.post("/v1/completions", json=body, headers=CPU))
                await asyncio.to_thread(wait_until, lambda: stack.gateway.admission.running == 1)
                second = asyncio.create_task(http.post("/v1/completions", json=body, headers=CPU))
                await asyncio.to_thread(wait_until, lambda: stack.gateway.admission.queued == 1)
                third = await http.post("/v1/completions", json=body, headers=CPU)
                first.cancel()
                second.cancel()
                await asyncio.gather(first, second, return_exceptions=True)
                return [third.status_code, int(third.headers["retry-after"])]

        assert asyncio.run(three()) == [503, 1]
        stack.assert_idle()


def test_a_request_id_in_use_is_refused(stack):
    stack.worker.script.endless = True
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 150, "stream": True}
    headers = {**CPU, "X-Request-Id": "twice"}
    with stack.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        lines = response.iter_lines()
        assert next(lines)
        assert error_of(stack.complete(headers), 400)["param"] == "X-Request-Id"


def test_an_unplanned_error_says_nothing_about_itself():
    failed = describe(KeyError("secret"))
    assert failed.status == 500
    assert "secret" not in failed.body["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status"), [(CapacityError("x"), 503), (LinkError("x"), 503), (EngineError("x"), 502)]
)
def test_status_of_an_error(error, status):
    assert describe(error).status == status
