"""Several answers to a prompt, several prompts in a request, and prompts that come back."""

from __future__ import annotations

import msgspec
import openai
import pytest

from tests.proxy.conftest import Stack, make_cluster, running
from tests.proxy.test_failures import error_of
from transfer.messages import Reserve, Start

ROUTES = ("split", "gpu", "cpu")
QUESTION = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(stack: Stack):
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def texts_by_index(chunks, text) -> dict[int, str]:
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            found[choice.index] = found.get(choice.index, "") + (text(choice) or "")
    return found


@pytest.mark.parametrize("route", ROUTES)
def test_chat(client, stack, route):
    ask = {"model": "tiny", "messages": QUESTION, "n": 3, "extra_headers": {"X-Isthmus-Route": route}}
    whole = client.chat.completions.create(**ask)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert {choice.message.content for choice in whole.choices} == {"one two three"}
    assert whole.usage.completion_tokens == 9
    assert whole.usage.prompt_tokens == stack.entries()[0]["prompt_tokens"]
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert [chunk.choices[0].delta.role for chunk in chunks[:3]] == ["assistant"] * 3
    assert texts_by_index(chunks, lambda choice: choice.delta.content) == dict.fromkeys(range(3), "one two three")
    endings = [chunk.choices[0] for chunk in chunks[-3:]]
    assert [(ending.index, bool(ending.finish_reason)) for ending in endings] == [(0, True), (1, True), (2, True)]


@pytest.mark.parametrize("route", ROUTES)
def test_completions(client, route):
    ask = {"model": "tiny", "prompt": "hi", "n": 2, "extra_headers": {"X-Isthmus-Route": route}}
    assert [choice.text for choice in client.completions.create(**ask).choices] == ["one two three"] * 2
    chunks = client.completions.create(**ask, stream=True)
    assert texts_by_index(chunks, lambda choice: choice.text) == dict.fromkeys(range(2), "one two three")


def test_each_choice_draws_its_own_first_token(stack):
    stack.chat({"X-Isthmus-Route": "split"}, n=2)
    assert stack.worker.heard(Reserve)[0].choices == 2
    assert stack.worker.heard(Start)[0].first_token is None
    assert "n" not in stack.prefill.bodies[0]


def test_choices_share_the_workers_context(stack):
    stack.chat({"X-Isthmus-Route": "cpu"}, n=2)
    alone = stack.chat({"X-Isthmus-Route": "cpu"}).json()["usage"]["prompt_tokens"]
    shared, whole = (reserve.sampling.max_tokens for reserve in stack.worker.heard(Reserve))
    assert (shared, whole) == ((300 - alone) // 2, 300 - alone)
    error = error_of(stack.chat({"X-Isthmus-Route": "cpu"}, n=3, max_tokens=100), 400)
    assert error["code"] == "context_length_exceeded"
    assert stack.chat({"X-Isthmus-Route": "gpu"}, n=3, max_tokens=100).status_code == 200


def test_choices_have_a_stream_each_where_cells_are_divided(stack, monkeypatch):
    (node,) = stack.gateway.workers
    monkeypatch.setattr(node, "welcome", msgspec.structs.replace(node.welcome, sequence_cells=150))
    stack.chat({"X-Isthmus-Route": "cpu"}, n=2)
    prompt_tokens = stack.chat({"X-Isthmus-Route": "cpu"}).json()["usage"]["prompt_tokens"]
    limits = [reserve.sampling.max_tokens for reserve in stack.worker.heard(Reserve)]
    assert limits == [150 - prompt_tokens] * 2
    error = error_of(stack.chat({"X-Isthmus-Route": "cpu"}, max_tokens=150), 400)
    assert "the context is 150 tokens" in error["message"]
    assert stack.chat({"X-Isthmus-Route": "gpu"}, max_tokens=150).status_code == 200


@pytest.mark.parametrize("prompts", [["a", "bc"], [[5], [6, 7]]])
def test_several_prompts(stack, client, prompts):
    whole = client.completions.create(model="tiny", prompt=prompts, n=2)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.usage.prompt_tokens == 3
    assert whole.usage.completion_tokens == 12
    assert sorted(entry["prompt_tokens"] for entry in stack.entries()) == [1, 2]
    chunks = client.completions.create(model="tiny", prompt=prompts, stream=True, echo=True)
    vocabulary = stack.gateway.renderer.vocabulary
    said = [prompt if isinstance(prompt, str) else vocabulary.text(prompt) for prompt in prompts]
    expected = {place: text + "one two three" for place, text in enumerate(said)}
    assert texts_by_index(chunks, lambda choice: choice.text) == expected


def test_one_bad_prompt_ends_the_others(stack):
    stack.worker.script.endless = True
    error = error_of(stack.complete(prompt=[[5], [258]], max_tokens=100), 400)
    assert error["param"] == "prompt"
    assert {entry["status"] for entry in stack.entries()} == {"invalid_request"}


def test_ledgers_of_several_prompts(stack):
    entries = stack.complete(prompt=["a", "b"], isthmus=True).json()["isthmus"]
    assert [entry["request_id"][-2:] for entry in entries] == ["-0", "-1"]
    assert stack.complete(prompt=["a"], isthmus=True).json()["isthmus"]["status"] == "ok"


def test_best_of_keeps_the_likeliest(stack):
    stack.worker.script.likeliest_choice = 1
    answer = stack.complete(n=1, best_of=3).json()
    assert [choice["text"] for choice in answer["choices"]] == ["one two three!"]
    assert answer["choices"][0]["index"] == 0
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 9
    assert stack.worker.heard(Reserve)[0].choices == 3


def test_best_of_is_refused_where_it_means_nothing(stack):
    assert error_of(stack.complete(best_of=2, stream=True), 400)["param"] == "best_of"
    assert error_of(stack.complete(n=3, best_of=2), 400)["param"] == "best_of"


@pytest.mark.parametrize("route", ROUTES)
def test_echo_of_text(stack, route):
    headers = {"X-Isthmus-Route": route}
    assert stack.complete(headers, prompt="grüß", echo=True).json()["choices"][0]["text"] == "grüßone two three"


def test_scoring_a_prompt_is_vllms(stack):
    answer = stack.complete(prompt=[5, 6, 7], echo=True, logprobs=1, max_tokens=1)
    assert answer.headers["x-isthmus-route"] == "gpu"
    assert answer.headers["x-isthmus-reason"] == "only_vllm_can"
    choice = answer.json()["choices"][0]
    assert choice["text"] == "[prompt]one two three"
    assert choice["logprobs"]["token_logprobs"] == [None, *[-0.5] * 5]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert stack.prefill.bodies[0]["echo"] is True
    for route in ("split", "cpu"):
        error = error_of(stack.complete({"X-Isthmus-Route": route}, echo=True, logprobs=1), 400)
        assert error["param"] == "echo"


def test_an_echo_alone_may_generate_nothing(stack):
    stack.complete(echo=True, max_tokens=0)
    assert stack.prefill.bodies[0]["max_tokens"] == 0


def test_scoring_without_vllm(hf_dir):
    with running(make_cluster(hf_dir), prefill_up=False) as stack:
        assert "echo needs the prefill node" in error_of(stack.complete(echo=True, logprobs=1), 503)["message"]


def test_greedy_choices_are_copies_of_vllms_one(stack):
    answer = stack.chat({"X-Isthmus-Route": "gpu"}, n=3, temperature=0).json()
    assert stack.prefill.bodies[0]["n"] == 1
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["one two three"] * 3
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 9
    stack.chat({"X-Isthmus-Route": "gpu"}, n=3)
    assert stack.prefill.bodies[1]["n"] == 3
