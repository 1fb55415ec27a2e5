"""A node fails in the middle of an answer: others go on, and the client's answer has no seam."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from proxy.vocabulary import Vocabulary
from tests.proxy.conftest import Stack, make_cluster, running, wait_until
from tests.proxy.fake_worker import FakeWorker
from tests.proxy.workers import announced
from transfer.messages import Abort, Failure, Reserve, Start

SPLIT = {"X-Isthmus-Route": "split"}
E_ACUTE = "\u00e9"


def spell(text: bytes, vocabulary: Vocabulary) -> list[int]:
    """One token for each byte."""
    return [next(token for token in range(258) if vocabulary.piece(token) == bytes([byte])) for byte in text]


def told(response) -> str:
    """All text of a stream, which has no error in it."""
    lines = response.text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert not any("error" in chunk for chunk in chunks), chunks
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


@pytest.fixture
def spelled(stack: Stack) -> Stack:
    """The fakes say digits, spelled as their tokens: 1 is vLLM's first, 2 and 3 are the worker's."""
    vocabulary = stack.gateway.renderer.vocabulary
    spelling = {text: spell(text.encode(), vocabulary) for text in "0123456789ab"}
    stack.prefill.script.spelling = stack.worker.script.spelling = spelling
    stack.prefill.script.first_text = stack.worker.script.first_text = "1"
    stack.worker.script.texts = ["2", "3"]
    return stack


@pytest.fixture(params=["link_error", "protocol_error", "codec_error"])
def lost(request, spelled) -> Stack:
    """A stack whose worker never gets the KV of a prompt from the wire."""
    spelled.worker.script.kv_failure = Failure(code=request.param, message="the link is down")
    spelled.prefill.script.texts = ["8", "9"]
    return spelled


def test_vllm_goes_on_after_the_token_that_the_client_has(lost):
    answer = lost.chat(max_tokens=9).json()
    assert answer["choices"][0]["message"]["content"] == "189"
    assert answer["usage"]["completion_tokens"] == 3
    prefill, rest = lost.prefill.bodies
    assert rest["prompt"] == prefill["prompt"] + lost.prefill.script.spelling["1"]
    assert rest["max_tokens"] == 8
    (entry,) = lost.entries()
    assert (entry["route"], entry["reason"], entry["status"]) == ("gpu", "failed_over", "ok")
    assert entry["failed_over"] == lost.worker.script.kv_failure.code
    first, second = entry["attempts"]
    assert (first["route"], first["error"], first["completion_tokens"]) == ("split", entry["failed_over"], 1)
    assert (second["route"], second["error"], second["completion_tokens"]) == ("gpu", None, 2)
    assert first["worker"] == lost.gateway.workers.pinned.name
    assert second["worker"] is None
    lost.assert_idle()


def test_a_stream_goes_on_too(lost):
    assert told(lost.chat(stream=True)) == "189"


def test_a_token_that_the_client_has_not_is_forgotten(lost):
    lost.prefill.script.first_text = "caf\ufffd"
    assert lost.chat(max_tokens=9).json()["choices"][0]["message"]["content"] == "89"
    prefill, rest = lost.prefill.bodies
    assert rest["prompt"] == prefill["prompt"]
    assert rest["max_tokens"] == 9


def test_a_forced_route_says_what_happened(lost):
    answer = lost.chat(headers=SPLIT)
    assert answer.status_code >= 500
    assert answer.json()["error"]["code"] == lost.worker.script.kv_failure.code
    assert len(lost.prefill.bodies) == 1
    assert lost.entries()[0]["failed_over"] is None
    assert [attempt["error"] for attempt in lost.entries()[0]["attempts"]] == [lost.worker.script.kv_failure.code]


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_penalties_keep_the_answer_with_workers(lost, penalty):
    """VLLM would take the first token for input; a worker is told that it is output."""
    lost.worker.script.texts_after_another = ["4"]
    assert lost.chat(**{penalty: 0.5}).json()["choices"][0]["message"]["content"] == "14"
    assert len(lost.prefill.bodies) == 1
    first, second = lost.worker.heard(Reserve)
    assert (first.prior_output, second.prior_output) == (0, 1)
    assert second.prompt == first.prompt + lost.prefill.script.spelling["1"]
    assert second.source == "local"


def test_the_worker_prefills_itself_where_vllm_fails_too(lost):
    lost.worker.script.spelling["4"] = [4]
    lost.worker.script.texts_after_another = ["6", "7"]
    lost.prefill.script.texts, lost.prefill.script.fail_in_stream = ["5"], True
    assert lost.chat(max_tokens=9).json()["choices"][0]["message"]["content"] == "1567"
    first, second = lost.worker.heard(Reserve)
    assert (first.source, second.source) == ("kv", "local")
    spelling = lost.worker.script.spelling
    assert second.prompt == first.prompt + spelling["1"] + spelling["5"]
    assert (second.prior_output, second.sampling.max_tokens) == (2, 7)
    assert second.request_id != first.request_id
    wait_until(lambda: lost.worker.heard(Abort))
    assert lost.worker.heard(Abort)[0].request_id == first.request_id
    (entry,) = lost.entries()
    assert [attempt["route"] for attempt in entry["attempts"]] == ["split", "gpu", "cpu"]
    assert entry["completion_tokens"] >= 4


def test_three_attempts_are_all(lost):
    lost.prefill.script.texts, lost.prefill.script.fail_in_stream = [], True
    lost.worker.script.fail_after_texts = 0
    answer = lost.chat()
    assert answer.status_code >= 500
    assert answer.json()["error"]["message"] == "llama.cpp fell over"
    assert len(lost.entries()[0]["attempts"]) == 3
    lost.assert_idle()


@pytest.mark.parametrize("broken", [{"refuse": (500, "dead engine")}, {"export": {"error": "no room"}}, {"hang": True}])
def test_vllm_fails_before_its_first_token(spelled, broken):
    for name, value in broken.items():
        setattr(spelled.prefill.script, name, value)
    assert told(spelled.chat(stream=True)) == "123"
    (entry,) = spelled.entries()
    assert [attempt["route"] for attempt in entry["attempts"]] == ["split", "cpu"]
    assert (entry["route"], entry["reason"], entry["codec"]) == ("cpu", "failed_over", None)
    assert entry["worker"] == spelled.gateway.workers.pinned.name
    # In the place that was reserved already.
    assert len(spelled.worker.heard(Reserve)) == 1
    assert [start.local for start in spelled.worker.heard(Start)] == [True]


def test_vllm_dies_in_mid_stream(spelled):
    spelled.prefill.script.texts, spelled.prefill.script.fail_in_stream = ["1", "2"], True
    spelled.worker.script.texts_after_another = ["3", "4"]
    # So that auto takes route gpu.
    node = spelled.gateway.workers.pinned
    for _ in range(3):
        node.breaker.failed(10**30)
    assert told(spelled.chat(stream=True)) == "1234"
    entry = spelled.entries()[0]
    assert [attempt["route"] for attempt in entry["attempts"]] == ["gpu", "cpu"]
    assert spelled.worker.heard(Reserve)[0].prior_output == 2


def test_half_a_character_and_a_stop_string_cross_the_seam(spelled):
    vocabulary = spelled.gateway.renderer.vocabulary
    first, second = spell(E_ACUTE.encode(), vocabulary)
    worker, vllm = spelled.worker.script, spelled.prefill.script
    # The worker holds half of a character, and says nothing of it yet.
    worker.texts, worker.fail_after_texts = ["2", "", "never"], 2
    worker.spelling[""] = [first]
    vllm.spelling = vllm.spelling | {"half": [second]}
    vllm.texts = ["half", "a", "b", "9"]
    assert told(spelled.chat(stream=True, stop="ab")) == "12" + E_ACUTE
    # And here the beginning of a stop string.
    worker.spelling[""] = worker.spelling["a"]
    vllm.texts = ["b", "9"]
    assert told(spelled.chat(stream=True, stop="ab")) == "12"
    assert told(spelled.chat(stream=True, stop="ac")) == "12ab9"
    spelled.assert_idle()


def test_the_tokens_run_out_at_the_seam(spelled):
    spelled.worker.script.fail_after_texts = 1
    answer = spelled.chat(max_tokens=2).json()
    assert answer["choices"][0]["message"]["content"] == "12"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert len(spelled.prefill.bodies) == 1


def test_a_text_that_its_tokens_do_not_spell_ends_with_the_error(stack):
    stack.worker.script.fail_after_texts = 1
    assert stack.chat().json()["error"]["message"] == "llama.cpp fell over"


def test_several_choices_start_again_only_before_their_first_token(stack):
    stack.worker.script.fail_after_texts = 0
    assert len(stack.chat(n=2).json()["choices"]) == 2
    stack.worker.script.fail_after_texts = 1
    assert stack.chat(n=2).json()["error"]["message"] == "llama.cpp fell over"


@pytest.fixture
def two(hf_dir) -> Iterator[tuple[Stack, FakeWorker]]:
    """A stack with a second worker, which announces itself."""
    with running(make_cluster(hf_dir)) as stack, announced(stack) as second:
        yield stack, second


def test_a_worker_that_fails_is_replaced_by_another(two):
    stack, second = two
    for worker in (stack.worker, second):
        worker.script.fail_after_texts = 0
    # So that the client has nothing of it.
    stack.prefill.script.first_text = "caf\ufffd"
    answer = stack.chat(SPLIT)
    assert answer.json()["error"]["message"] == "llama.cpp fell over"
    attempts = stack.entries()[0]["attempts"]
    assert [attempt["route"] for attempt in attempts] == ["split", "split"]
    assert {attempt["worker"] for attempt in attempts} == set(stack.gateway.workers.nodes)
    for worker in (stack.worker, second):
        worker.script.fail_after_texts = None
    assert stack.chat(SPLIT).status_code == 200
