"""The clients that people use, against the whole proxy: OpenAI's own, waiting or not, and LangChain's."""

from __future__ import annotations

import asyncio

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

from tests.proxy.conftest import Stack
from tests.proxy.test_tools import CALL, QUESTION, TOOLS, say, shared_stack
from transfer.messages import Reserve

__all__ = ["shared_stack"]


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


@pytest.fixture
def langchain(stack: Stack) -> ChatOpenAI:
    return ChatOpenAI(model="tiny", base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=20)


def test_openai_without_waiting(stack):
    async def ask() -> tuple[str, str, list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
            whole, stream, many = await asyncio.gather(
                client.chat.completions.create(model="tiny", messages=QUESTION),
                client.chat.completions.create(model="tiny", messages=QUESTION, stream=True),
                asyncio.gather(*(client.completions.create(model="tiny", prompt="hi") for _ in range(5))),
            )
            streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
            return whole.choices[0].message.content, streamed, [answer.choices[0].text for answer in many]

    whole, streamed, many = asyncio.run(ask())
    assert whole == streamed == "one two three"
    assert many == [whole] * 5


def test_openai_parses_an_answer_into_a_class(stack):
    say(stack, '{"name": "Ada",', ' "age": 36}')
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.parse(model="tiny", messages=QUESTION, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Ada", age=36)
    assert '"additionalProperties": false' in stack.worker.heard(Reserve)[0].sampling.json_schema


def test_openai_raises_its_own_errors(stack):
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=QUESTION, temperature=9)
        assert (caught.value.param, caught.value.code) == ("temperature", "invalid_request")
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt", messages=QUESTION)


def test_langchain_whole_streamed_and_in_batches(langchain):
    answer = langchain.invoke("hi")
    assert answer.content == "one two three"
    assert answer.usage_metadata["output_tokens"] == 3
    assert "".join(chunk.content for chunk in langchain.stream("hi")) == "one two three"
    assert [one.content for one in langchain.batch(["a", "b"])] == ["one two three"] * 2
    logprobs = langchain.bind(logprobs=True).invoke("hi").response_metadata["logprobs"]["content"]
    assert [entry["logprob"] for entry in logprobs] == [-0.5, -0.25, -0.25]


def test_langchain_tools(stack, langchain):
    stack.prefill.script.first_text = "So: "
    stack.worker.script.texts = [CALL]
    told = langchain.bind_tools(TOOLS)
    answer = told.invoke([HumanMessage("Weather?")])
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"town": "Ulm"})
    streamed = [call for chunk in told.stream("Weather?") for call in chunk.tool_calls]
    assert [call["name"] for call in streamed] == ["weather"]
    stack.prefill.script.first_text, stack.worker.script.texts = "one", [" two"]
    rest = told.invoke([HumanMessage("Weather?"), answer, ToolMessage("sunny", tool_call_id=call["id"])])
    assert isinstance(rest, AIMessage)
    assert rest.content == "one two"


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_structured_output(stack, langchain, method):
    say(stack, '{"name": "Ada",', ' "age": 36}')
    assert langchain.with_structured_output(Person, method=method).invoke("hi") == Person(name="Ada", age=36)


def test_langchain_completions(stack):
    llm = OpenAI(model="tiny", base_url=f"{stack.url}/v1", api_key="none", max_retries=0, n=2, best_of=2)
    found = llm.generate(["a", "b"])
    assert [[one.text for one in prompt] for prompt in found.generations] == [["one two three"] * 2] * 2
