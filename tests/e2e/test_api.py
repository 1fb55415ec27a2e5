"""What OpenAI's API promises, kept by the real engines: log probabilities, schemas, choices, tools, prompt scores."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import jsonschema
import pytest

pytestmark = pytest.mark.engines

ROUTES = ("split", "gpu", "cpu")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "maxLength": 12}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}


def post(http: httpx.Client, path: str, route: str, **body: Any) -> dict[str, Any]:
    model = http.get("/v1/models").json()["data"][0]["id"]
    response = http.post(path, json={"model": model, "temperature": 0} | body, headers={"X-Isthmus-Route": route})
    assert response.status_code == 200, response.text
    assert response.headers["x-isthmus-route"] == route
    return response.json()


def chat(http: httpx.Client, route: str, text: str = "Name three rivers.", **body: Any) -> dict[str, Any]:
    return post(
        http, "/v1/chat/completions", route, messages=[{"role": "user", "content": text}], **({"max_tokens": 12} | body)
    )


@pytest.mark.parametrize("route", ROUTES)
def test_log_probabilities_are_of_the_text(http: httpx.Client, route: str):
    choice = chat(http, route, logprobs=True, top_logprobs=3)["choices"][0]
    entries = choice["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == choice["message"]["content"]
    for entry in entries:
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(tops) == 3
        assert tops == sorted(tops, reverse=True)
        # Greedy picking takes the likeliest.
        assert entry["logprob"] == tops[0] <= 0
        assert sum(map(math.exp, tops)) <= 1.0 + 1e-3


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_schema_is_kept(http: httpx.Client, route: str, temperature: float):
    asked = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    answer = chat(
        http, route, "Invent a person.", response_format=asked, max_tokens=200, temperature=temperature, seed=3
    )
    assert answer["choices"][0]["finish_reason"] == "stop"
    jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), PERSON)


@pytest.mark.parametrize("route", ROUTES)
def test_several_choices(http: httpx.Client, route: str):
    greedy = chat(http, route, n=3)
    assert len({choice["message"]["content"] for choice in greedy["choices"]}) == 1
    assert greedy["usage"]["completion_tokens"] == 36
    drawn = chat(http, route, n=3, temperature=1.5, seed=5, max_tokens=24)
    assert len({choice["message"]["content"] for choice in drawn["choices"]}) > 1


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_that_must_be_called(http: httpx.Client, route: str, tool_choice: Any):
    answer = chat(
        http,
        route,
        "How is the weather in Ulm?",
        tools=[WEATHER],
        tool_choice=tool_choice,
        parallel_tool_calls=False,
        max_tokens=200,
    )
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert isinstance(json.loads(call["function"]["arguments"])["town"], str)


def test_a_prompt_is_scored(http: httpx.Client):
    """As lm-eval asks: the prompt's log probabilities, and one token that it throws away."""
    prompts = [http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in ("A cat sat", "Sat cat a on")]
    answer = post(http, "/v1/completions", "gpu", prompt=prompts, max_tokens=1, logprobs=1, echo=True, seed=1)
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        scores = choice["logprobs"]["token_logprobs"]
        assert scores[0] is None
        assert len(scores) == len(prompt) + 1
        assert all(score < 0 for score in scores[1:])
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    first, second = (sum(choice["logprobs"]["token_logprobs"][1:-1]) for choice in answer["choices"])
    assert first > second
    alone = post(http, "/v1/completions", "gpu", prompt=prompts[0], max_tokens=0, logprobs=1, echo=True)
    assert alone["choices"][0]["text"] == "A cat sat"
    assert len(alone["choices"][0]["logprobs"]["tokens"]) == len(prompts[0])


@pytest.mark.parametrize("route", ROUTES)
def test_at_least_so_many_tokens(http: httpx.Client, route: str):
    answer = chat(http, route, "Say yes.", min_tokens=20, max_tokens=24)
    assert answer["usage"]["completion_tokens"] >= 20
