"""Log probabilities by each route and in both shapes, whole and streamed."""

from __future__ import annotations

import math

import openai
import pytest

from proxy import logprobs
from proxy.vocabulary import Vocabulary
from tests.proxy.conftest import Stack
from tests.proxy.test_failures import CPU, GPU, SPLIT, error_of
from transfer.messages import Reserve, TokenLogprob

QUESTION = [{"role": "user", "content": "hi"}]
# Token 42 and its followers are vLLM's, 0 and its followers the worker's (see the fakes).
TOKENS = {"split": [42, 0, 1], "gpu": [42, 43, 44], "cpu": [0, 1, 2]}


@pytest.fixture
def client(stack: Stack):
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
def vocabulary(stack: Stack) -> Vocabulary:
    return stack.gateway.renderer.vocabulary


@pytest.mark.parametrize("route", TOKENS)
def test_chat_whole_and_streamed(client, vocabulary, route):
    ask = {
        "model": "tiny",
        "messages": QUESTION,
        "logprobs": True,
        "top_logprobs": 2,
        "extra_headers": {"X-Isthmus-Route": route},
    }
    entries = client.chat.completions.create(**ask).choices[0].logprobs.content
    assert [bytes(entry.bytes) for entry in entries] == [vocabulary.piece(token) for token in TOKENS[route]]
    for token, entry in zip(TOKENS[route], entries, strict=True):
        vllms = token >= 42
        assert entry.logprob == (-0.5 if vllms else -0.25)
        assert [top.logprob for top in entry.top_logprobs] == [entry.logprob, -1.5 if vllms else -2.0]
        assert entry.top_logprobs[0].token == entry.token
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True)]
    assert [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content] == entries


@pytest.mark.parametrize("route", TOKENS)
def test_completions_whole_and_streamed(client, vocabulary, route):
    ask = {"model": "tiny", "prompt": "hi", "logprobs": 1, "extra_headers": {"X-Isthmus-Route": route}}
    found = client.completions.create(**ask).choices[0].logprobs
    names = [vocabulary.text([token]) for token in TOKENS[route]]
    assert found.tokens == names
    assert found.token_logprobs == [-0.5 if token >= 42 else -0.25 for token in TOKENS[route]]
    assert [set(top) for top in found.top_logprobs] == [{name} for name in names]
    assert found.text_offset == [sum(map(len, names[:place])) for place in range(3)]
    parts = [chunk.choices[0].logprobs for chunk in client.completions.create(**ask, stream=True)]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for part in parts if part for one in getattr(part, field)] == getattr(found, field)


def test_none_are_sent_unless_asked_for(client, stack):
    answer = client.chat.completions.create(model="tiny", messages=QUESTION)
    assert answer.choices[0].logprobs is None
    assert stack.prefill.bodies[0]["logprobs"] is None
    assert stack.worker.heard(Reserve)[0].sampling.logprobs is None


def test_zero_alternatives(client):
    chat = client.chat.completions.create(model="tiny", messages=QUESTION, logprobs=True)
    assert [entry.top_logprobs for entry in chat.choices[0].logprobs.content] == [[], [], []]
    completion = client.completions.create(model="tiny", prompt="hi", logprobs=0)
    # The token itself is always among them.
    assert [len(top) for top in completion.choices[0].logprobs.top_logprobs] == [1, 1, 1]


def test_a_first_token_whose_text_waits_keeps_its_log_probability(client, stack):
    stack.prefill.script.first_text = "on\ufffd"
    chat = client.chat.completions.create(model="tiny", messages=QUESTION, logprobs=True)
    # The fake worker says token 0 for the first text; it is vLLM's, and so is the log probability.
    assert [entry.logprob for entry in chat.choices[0].logprobs.content] == [-0.5, -0.25, -0.25]


def test_a_decoder_that_samples_the_first_token_reports_it(client):
    chat = client.chat.completions.create(model="tiny", messages=QUESTION, logprobs=True, seed=1)
    assert [entry.logprob for entry in chat.choices[0].logprobs.content] == [-0.25] * 3


def test_half_characters_are_exact_bytes(vocabulary):
    first, second = (
        next(token for token in range(258) if vocabulary.piece(token) == byte) for byte in (b"\xc3", b"\xbc")
    )
    entries = [TokenLogprob(first, -1.0), TokenLogprob(second, -math.inf)]
    chat = logprobs.chat(entries, vocabulary)["content"]
    assert [entry["bytes"] for entry in chat] == [[0xC3], [0xBC]]
    assert chat[0]["token"] == "\ufffd"
    assert chat[1]["logprob"] == -9999.0
    completion = logprobs.completion(entries, vocabulary, 5)
    assert completion["tokens"] == ["bytes:\\xc3", "bytes:\\xbc"]
    # One character in all: the second half begins none.
    assert completion["text_offset"] == [5, 6]
    assert logprobs.width(entries, vocabulary) == 1


def test_log_probabilities_of_the_prompt_are_vllms_by_every_route(stack):
    for route in (SPLIT, GPU, CPU):
        (choice,) = stack.complete(route, prompt_logprobs=1).json()["choices"]
        assert [row and list(row) for row in choice["prompt_logprobs"]] == [None, [str(token_of(stack, "i"))]]
    asked = [body["prompt_logprobs"] for body in stack.prefill.bodies if body.get("prompt_logprobs") is not None]
    assert asked == [1, 1, 1]
    assert stack.chat(prompt_logprobs=0).json()["prompt_logprobs"][0] is None
    assert error_of(stack.complete(prompt_logprobs=1, stream=True), 400)["param"] == "prompt_logprobs"


def token_of(stack, text: str) -> int:
    (token,) = stack.gateway.renderer._tokenizer(text).input_ids
    return token
