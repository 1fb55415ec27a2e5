"""A split request whose KV is lost goes on elsewhere, and the client's answer has no seam."""

from __future__ import annotations

import json

import pytest

from tests.proxy.conftest import wait_until
from transfer.messages import Abort, Failure, Reserve


@pytest.fixture(params=["link_error", "protocol_error", "codec_error"])
def lost(request, stack):
    """A stack whose worker never gets the KV of a prompt from the wire."""
    stack.worker.script.kv_failure = Failure(code=request.param, message="the link is down")
    return stack


def test_vllm_goes_on_after_the_token_that_the_client_has(lost):
    lost.prefill.script.texts = [" two", " three"]
    answer = lost.chat(max_tokens=9).json()
    assert answer["choices"][0]["message"]["content"] == "one two three"
    assert answer["usage"]["completion_tokens"] == 3
    prefill, rest = lost.prefill.bodies
    assert rest["prompt"] == [*prefill["prompt"], 42]
    assert rest["max_tokens"] == 8
    (entry,) = lost.entries()
    assert (entry["route"], entry["reason"], entry["status"]) == ("gpu", "kv_lost", "ok")
    assert entry["failed_over"] == lost.worker.script.kv_failure.code
    lost.assert_idle()


def test_a_stream_goes_on_too(lost):
    lost.prefill.script.texts = [" two", " three"]
    lines = lost.chat(stream=True).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    texts = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(texts) == "one two three"
    assert not any("error" in chunk for chunk in chunks)


def test_a_token_that_the_client_has_not_is_forgotten(lost):
    lost.prefill.script.first_text = "caf\ufffd"
    assert lost.chat(max_tokens=9).json()["choices"][0]["message"]["content"] == "one two three"
    prefill, rest = lost.prefill.bodies
    assert rest["prompt"] == prefill["prompt"]
    assert rest["max_tokens"] == 9


def test_a_forced_route_says_what_happened(lost):
    answer = lost.chat(headers={"X-Isthmus-Route": "split"})
    assert answer.status_code >= 500
    assert answer.json()["error"]["code"] == lost.worker.script.kv_failure.code
    assert len(lost.prefill.bodies) == 1


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_penalties_that_would_miss_the_first_token_end_the_answer(lost, penalty):
    assert lost.chat(**{penalty: 0.5}).status_code >= 500
    assert len(lost.prefill.bodies) == 1


def test_the_worker_prefills_itself_where_vllm_is_gone(lost, monkeypatch):
    choose = lost.gateway._fail_over

    def without_vllm(*arguments):
        # For the length of the choice only: the stack is shared, and its heartbeat goes on.
        lost.gateway.prefill.up = False
        try:
            return choose(*arguments)
        finally:
            lost.gateway.prefill.up = True

    monkeypatch.setattr(lost.gateway, "_fail_over", without_vllm)
    assert lost.chat(max_tokens=9).json()["choices"][0]["message"]["content"].startswith("one")
    first, second = lost.worker.heard(Reserve)
    assert (first.source, second.source) == ("kv", "local")
    assert second.prompt == [*first.prompt, 42]
    assert second.request_id != first.request_id
    wait_until(lambda: lost.worker.heard(Abort))
    assert lost.worker.heard(Abort)[0].request_id == first.request_id
    assert lost.entries()[0]["route"] == "cpu"


def test_a_second_failure_ends_the_answer(lost):
    lost.prefill.script.texts = []
    lost.prefill.script.fail_in_stream = True
    answer = lost.chat()
    assert answer.status_code >= 500
    lost.assert_idle()
