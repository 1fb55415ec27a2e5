"""OpenAI's Python client and LangChain's, against the real engines."""

from __future__ import annotations

import json
from typing import Literal

import openai
import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from tests.e2e.conftest import Running

pytestmark = pytest.mark.engines

QUESTION = [{"role": "user", "content": "Invent a person."}]


class Person(BaseModel):
    """Somebody."""

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)


@pytest.fixture
def client(stack: Running):
    with openai.OpenAI(base_url=f"{stack.proxy_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def langchain(stack: Running) -> ChatOpenAI:
    return ChatOpenAI(
        model=stack.cluster.pair.name,
        base_url=f"{stack.proxy_url}/v1",
        api_key="none",
        max_retries=0,
        timeout=60,
        temperature=0,
        max_tokens=60,
        # Two engines do not say the same, word for word.
        default_headers={"X-Isthmus-Route": "split"},
    )


def test_openai_parses_what_the_engines_say(client, stack: Running):
    ask = {"model": stack.cluster.pair.name, "messages": QUESTION, "response_format": Person, "temperature": 0}
    answer = client.chat.completions.parse(**ask, max_completion_tokens=60)
    assert isinstance(answer.choices[0].message.parsed, Person)
    with client.chat.completions.stream(**ask, max_completion_tokens=60) as events:
        for _ in events:
            pass
        streamed = events.get_final_completion()
    assert isinstance(streamed.choices[0].message.parsed, Person)


def test_openai_older_functions(client, stack: Running):
    function = {"name": "age", "parameters": {"type": "object", "properties": {"years": {"type": "integer"}}}}
    function["parameters"] |= {"required": ["years"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model=stack.cluster.pair.name,
        messages=QUESTION,
        functions=[function],
        function_call={"name": "age"},
        temperature=0,
        max_tokens=40,
    )
    call = answer.choices[0].message.function_call
    assert call.name == "age"
    assert isinstance(json.loads(call.arguments)["years"], int)


@pytest.mark.parametrize("route", ["split", "gpu", "cpu"])
def test_openai_with_vllms_fields(client, stack: Running, route: str):
    for extra, said in (
        ({"guided_choice": ["heads", "tails (C++)"]}, ("heads", "tails (C++)")),
        ({"structured_outputs": {"regex": "(ab){3}"}}, ("ababab",)),
    ):
        answer = client.chat.completions.create(
            model=stack.cluster.pair.name,
            messages=QUESTION,
            max_tokens=20,
            extra_body=extra,
            extra_headers={"X-Isthmus-Route": route},
        )
        assert answer.choices[0].message.content in said


def test_openai_with_a_lark_grammar(client, stack: Running):
    extra = {"structured_outputs": {"grammar": 'start: "a"{3} END\nEND: "!"'}}
    ask = {"model": stack.cluster.pair.name, "prompt": "Say: ", "max_tokens": 20}
    assert client.completions.create(**ask, extra_body=extra).choices[0].text == "aaa!"


def test_openai_with_log_probabilities_of_the_prompt(client, stack: Running):
    ask = {"model": stack.cluster.pair.name, "prompt": [19556, 905, 30], "max_tokens": 2}
    choice = client.completions.create(**ask, extra_body={"prompt_logprobs": 1}).choices[0]
    first, second, third = choice.prompt_logprobs
    assert first is None
    assert second["905"]["logprob"] < 0
    assert third["30"]["rank"] >= 1


def test_langchain(langchain: ChatOpenAI):
    whole = langchain.invoke("Say yes.")
    assert whole.content
    assert whole.usage_metadata["output_tokens"] > 0
    chunks = list(langchain.stream("Say yes."))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert isinstance(langchain.with_structured_output(Person, method="json_schema").invoke("Invent."), Person)


def test_langchain_tools(langchain: ChatOpenAI):
    @tool
    def weather(town: Literal["Ulm", "Bonn"]) -> str:
        """The weather in a town."""
        return town

    answer = langchain.bind_tools([weather], tool_choice="weather").invoke("How is the weather in Ulm?")
    (call,) = answer.tool_calls
    assert call["name"] == "weather"
    assert call["args"]["town"] in ("Ulm", "Bonn")
