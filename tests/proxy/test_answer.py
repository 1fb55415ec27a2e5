"""What an OpenAI client sees, by each route, whole and streamed."""

from __future__ import annotations

import json

import openai
import pytest

from tests.proxy.conftest import Stack
from transfer.messages import Reserve, Start

ROUTES = ("split", "gpu", "cpu")
QUESTION = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(stack: Stack):
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.mark.parametrize("route", ROUTES)
def test_chat_whole(client, route):
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=QUESTION, extra_headers={"X-Isthmus-Route": route, "X-Request-Id": "my-id"}
    )
    answer = raw.parse()
    assert answer.choices[0].message.content == "one two three"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == ("length" if route == "gpu" else "stop")
    assert answer.usage.completion_tokens == 3
    assert answer.usage.prompt_tokens == len("<user>hi</s><assistant>") - 3  # </s> is one token
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 3
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.id == "chatcmpl-my-id"
    assert raw.headers["x-request-id"] == "my-id"
    assert raw.headers["x-isthmus-route"] == route
    assert "total;dur=" in raw.headers["server-timing"]


@pytest.mark.parametrize("route", ROUTES)
def test_chat_stream(client, route):
    stream = client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"X-Isthmus-Route": route},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.content for c in chunks[1:-2]] == ["one", " two", " three"]
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-2].choices[0].delta.content is None
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 3
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("route", ROUTES)
def test_completion_stream_and_whole(client, route):
    headers = {"X-Isthmus-Route": route}
    whole = client.completions.create(model="tiny", prompt="hi", extra_headers=headers)
    chunks = list(client.completions.create(model="tiny", prompt="hi", stream=True, extra_headers=headers))
    assert whole.object == "text_completion"
    assert whole.choices[0].text == "one two three" == "".join(chunk.choices[0].text for chunk in chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 3
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_stream_bytes(stack):
    answer = stack.chat(stream=True, isthmus=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    assert all(event.startswith("data: ") for event in events[:-1])
    last = json.loads(events[-3].removeprefix("data: "))
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert last["isthmus"]["route"] == "split"
    assert "usage" not in last


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [74, 75], [[74, 75]]])
def test_the_four_forms_of_a_prompt(stack, prompt):
    assert stack.complete(prompt=prompt).json()["usage"]["prompt_tokens"] == 2


def test_ids_pass_unchanged_to_both_nodes(stack):
    stack.complete(prompt=[5, 6, 7])
    assert stack.prefill.bodies[0]["prompt"] == [5, 6, 7]
    assert stack.worker.heard(Reserve)[0].prompt == [5, 6, 7]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_one_model(client):
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="serves 'tiny'"):
        client.models.retrieve("someone/else")


def test_sampling_reaches_both_nodes(stack):
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.1,
        "stop": "END",
        "max_tokens": 9,
        "ignore_eos": True,
        "stop_token_ids": [3, 4],
        "min_tokens": 2,
    }
    assert stack.chat(**fields, logit_bias={"5": -100}).status_code == 200
    body, sampling = stack.prefill.bodies[0], stack.worker.heard(Reserve)[0].sampling
    assert body["max_tokens"] == 1
    assert body["logit_bias"] == {"5": -100.0}
    assert body["stop"] == ["END"]
    assert sampling.max_tokens == 9
    assert sampling.stop == ("END",)
    assert sampling.logit_bias == {5: -100.0}
    assert body["stop_token_ids"] == list(sampling.stop_token_ids) == [3, 4]
    # One token is all that vLLM makes.
    assert (body["min_tokens"], sampling.min_tokens) == (1, 2)
    for name in fields.keys() - {"stop", "max_tokens", "stop_token_ids", "min_tokens"}:
        assert body[name] == getattr(sampling, name) == fields[name]


def test_default_max_tokens_is_what_the_context_leaves(stack):
    prompt_tokens = stack.chat().json()["usage"]["prompt_tokens"]
    stack.complete()
    chat, completion = (reserve.sampling.max_tokens for reserve in stack.worker.heard(Reserve))
    assert chat == 200 - prompt_tokens
    assert completion == 16


def test_text_parts_are_joined_and_developer_is_system(stack):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    as_parts = stack.chat(messages=[{"role": "developer", "content": parts}]).json()
    as_text = stack.chat(messages=[{"role": "system", "content": "hi"}]).json()
    assert as_parts["usage"] == as_text["usage"]
    first, second = stack.worker.heard(Reserve)
    assert first.prompt == second.prompt


def starts(stack: Stack) -> list[Start]:
    return stack.worker.heard(Start)


def test_first_token_goes_out_before_the_worker_speaks(stack):
    stack.chat()
    assert starts(stack) == [Start(request_id=starts(stack)[0].request_id, first_token=42, first_text_sent=True)]


@pytest.mark.parametrize(
    ("first_text", "stop"),
    [("", None), ("caf\ufffd", None), ("one", "ne w"), ("one", ["zzz", "one more"]), ("one", "e")],
)
def test_first_text_that_is_not_final_is_left_to_the_worker(stack, first_text, stop):
    stack.prefill.script.first_text = first_text
    assert stack.chat(stop=stop).json()["choices"][0]["message"]["content"] == "one two three"
    assert starts(stack)[0].first_token == 42
    assert not starts(stack)[0].first_text_sent


def test_a_seeded_draw_is_the_decoders(stack):
    assert stack.chat(seed=7).json()["choices"][0]["message"]["content"] == "one two three"
    stack.chat(seed=7, temperature=0)
    assert [start.first_token for start in starts(stack)] == [None, 42]


@pytest.mark.parametrize(("finish_reason", "max_tokens"), [("stop", 5), ("length", 1)])
def test_an_answer_of_one_token_needs_no_decoding(stack, finish_reason, max_tokens):
    stack.prefill.script.finish_reason = finish_reason
    stack.prefill.script.export = {"error": "nobody needs it"}
    answer = stack.chat(max_tokens=max_tokens).json()
    assert answer["choices"][0]["message"]["content"] == "one"
    assert answer["choices"][0]["finish_reason"] == finish_reason
    assert answer["usage"]["completion_tokens"] == 1
    assert not starts(stack)


def test_a_vanished_decode_node_changes_the_route(hf_dir):
    from tests.proxy.conftest import make_cluster, running

    with running(make_cluster(hf_dir), decode_up=False) as stack:
        answer = stack.chat(isthmus=True)
        assert answer.headers["x-isthmus-route"] == "gpu"
        assert answer.json()["isthmus"]["reason"] == "decode_down"
        health = stack.http.get("/health").json()
        assert health.items() >= {"status": "ok", "prefill": "up", "decode": "down"}.items()
        forced = stack.chat({"X-Isthmus-Route": "split"})
        assert forced.status_code == 503
        assert forced.json()["error"]["code"] == "link_error"
        assert "retry-after" in forced.headers
