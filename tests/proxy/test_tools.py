"""Tools from the request to the prompt, the grammar and the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator

import jsonschema
import msgspec
import openai
import pytest

from proxy.tools import Function, Tool, spell_out, use
from tests.proxy.conftest import Stack, make_cluster, running
from tests.proxy.test_failures import error_of
from transfer.errors import RequestError
from transfer.messages import Reserve

QUESTION = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": PARAMETERS}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Ulm"}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def shared_stack(hf_dir) -> Iterator[Stack]:
    """A proxy whose context holds the tools, which are long in a tokenizer of bytes."""
    cluster = make_cluster(hf_dir)
    prefill = msgspec.structs.replace(cluster.prefill, max_model_len=4001)
    decode = msgspec.structs.replace(cluster.decode, num_cells=8000)
    with running(msgspec.structs.replace(cluster, prefill=prefill, decode=decode)) as stack:
        yield stack


@pytest.fixture
def client(stack: Stack):
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def say(stack: Stack, *texts: str) -> None:
    """Let the engines answer ``texts``, whoever is asked for the first one."""
    stack.prefill.script.first_text = stack.worker.script.first_text = texts[0]
    stack.prefill.script.texts = list(texts)
    stack.worker.script.texts = list(texts[1:])
    stack.prefill.script.finish_reason = "stop"
    # vLLM's word on a first token would end the answer.
    stack.worker.script.finish_reason = "stop"


def prompt_of(stack: Stack) -> str:
    return stack.gateway.renderer.vocabulary.text(stack.worker.heard(Reserve)[-1].prompt)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_in_a_free_answer(stack, client, stream):
    stack.prefill.script.first_text = "Let me "
    stack.worker.script.texts = ["see.\n", CALL[:14], CALL[14:40], CALL[40:]]
    ask = {"model": "tiny", "messages": QUESTION, "tools": TOOLS}
    if stream:
        with client.chat.completions.stream(**ask) as events:
            answer = events.get_final_completion()
    else:
        answer = client.chat.completions.create(**ask)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "weather",
        {"town": "Ulm"},
    )
    assert call.id.startswith("call_")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["split", "gpu", "cpu"])
def test_an_answer_that_must_call(stack, client, route, stream):
    say(stack, '[{"name": "weather", "argu', 'ments": {"town": "Ulm"}}, {"name":', ' "clock", "arguments": {}}', "]")
    ask = {
        "model": "tiny",
        "messages": QUESTION,
        "tools": TOOLS,
        "tool_choice": "required",
        "extra_headers": {"X-Isthmus-Route": route},
    }
    if stream:
        with client.chat.completions.stream(**ask) as events:
            answer = events.get_final_completion()
    else:
        answer = client.chat.completions.create(**ask)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert not message.content
    assert [call.function.name for call in message.tool_calls] == ["weather", "clock"]
    assert len({call.id for call in message.tool_calls}) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_call(stack, client, stream):
    say(stack, '{"town"', ': "Ulm"', "}")
    ask = {"model": "tiny", "messages": QUESTION, "tools": TOOLS, "tool_choice": NAMED}
    if stream:
        chunks = list(client.chat.completions.create(**ask, stream=True))
        deltas = [chunk.choices[0].delta.tool_calls[0] for chunk in chunks if chunk.choices[0].delta.tool_calls]
        assert [delta.function.name for delta in deltas] == ["weather", None, None]
        arguments, reason = "".join(delta.function.arguments for delta in deltas), chunks[-1].choices[0].finish_reason
    else:
        choice = client.chat.completions.create(**ask).choices[0]
        arguments, reason = choice.message.tool_calls[0].function.arguments, choice.finish_reason
        assert choice.message.content is None
    assert json.loads(arguments) == {"town": "Ulm"}
    assert reason == "stop"
    assert json.loads(stack.worker.heard(Reserve)[0].sampling.json_schema) == PARAMETERS


def test_calls_of_several_choices_stay_apart(stack):
    say(stack, CALL[:20], CALL[20:])
    answer = stack.chat({"X-Isthmus-Route": "gpu"}, tools=TOOLS, n=2).json()
    assert [len(choice["message"]["tool_calls"]) for choice in answer["choices"]] == [1, 1]


def test_no_call_and_cut_off_calls(stack):
    plain = stack.chat(tools=TOOLS).json()["choices"][0]
    assert plain["message"] == {"role": "assistant", "content": "one two three", "refusal": None}
    assert plain["finish_reason"] == "stop"
    say(stack, '[{"name": "clo')
    stack.worker.script.finish_reason = "length"
    cut = stack.chat({"X-Isthmus-Route": "cpu"}, tools=TOOLS, tool_choice="required").json()["choices"][0]
    assert cut["finish_reason"] == "length"
    assert "tool_calls" not in cut["message"]


def test_none_hides_the_tools(stack):
    say(stack, CALL, " x")
    answer = stack.chat({"X-Isthmus-Route": "cpu"}, tools=TOOLS, tool_choice="none").json()
    assert answer["choices"][0]["message"]["content"] == CALL + " x"
    assert "weather" not in prompt_of(stack)
    assert stack.worker.heard(Reserve)[0].sampling.json_schema == ""


def test_a_template_without_tools_hears_of_them_in_words(stack):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Ulm"}'}},
                {"id": "b", "type": "function", "function": {"name": "clock", "arguments": ""}},
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "noon"}]},
    ]
    stack.chat(messages=messages, tools=TOOLS)
    prompt = prompt_of(stack)
    assert prompt.startswith("<system>Be brief.\n\n")
    assert json.dumps(WEATHER["function"]) in prompt
    assert CALL in prompt
    assert '{"name": "clock", "arguments": {}}' in prompt
    assert "<user><tool_response>\nsunny\n</tool_response>\n<tool_response>\nnoon\n</tool_response></s>" in prompt


def test_a_template_that_knows_tools_is_left_to_it(stack, monkeypatch):
    knowing = (
        "{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}{% for m in messages %}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments.town }}</tool_call>{% endfor %}"
        "{{ m.content }}{% endfor %}"
    )
    monkeypatch.setattr(stack.gateway.renderer._tokenizer, "chat_template", knowing)
    function = {"name": "weather", "arguments": '{"town": "Ulm"}'}
    past = {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": function}]}
    stack.chat(messages=[*QUESTION, past, {"role": "tool", "tool_call_id": "a", "content": "sunny"}], tools=TOOLS)
    assert prompt_of(stack) == "[weather][clock]hi<tool_call>Ulm</tool_call>sunny"


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("tools", {"tools": [{}]}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": 5}}}]}),
        ("tools", {"tools": [CLOCK] * 129}),
        ("tool_choice", {"tools": TOOLS, "tool_choice": "sometimes"}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tools": [CLOCK], "tool_choice": NAMED}),
        ("functions", {"functions": [{"name": "a"}], "tools": TOOLS}),
        ("functions", {"functions": [{"name": "a", "parameters": {"type": 5}}]}),
        ("functions", {"functions": [{}]}),
        ("function_call", {"function_call": {"name": "a"}}),
        ("function_call", {"functions": [{"name": "a"}], "function_call": {"name": "b"}}),
        ("function_call", {"functions": [{"name": "a"}], "function_call": "required"}),
        ("messages", {"messages": [{"role": "assistant"}]}),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}),
        (
            "messages",
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "a", "arguments": "{"}}]}
                ]
            },
        ),
    ],
)
def test_what_is_wrong_is_named(stack, field, fields):
    assert error_of(stack.chat(**fields), 400)["param"] == field


def test_the_schema_of_a_call_takes_calls_and_nothing_else():
    point = {"$ref": "#/$defs/point"}
    defined = {"type": "object", "properties": {"at": point}, "$defs": {"point": {"type": "integer"}}}
    tools = [
        Tool(type="function", function=Function(name="a", parameters=defined)),
        Tool(type="function", function=Function(name="b", parameters=PARAMETERS)),
    ]
    schema = use(tools, "required", parallel=False).schema()
    jsonschema.validate([{"name": "a", "arguments": {"at": 5}}], schema)
    jsonschema.validate([{"name": "b", "arguments": {"town": "Ulm"}}], schema)
    for wrong in (
        [],
        [{"name": "a", "arguments": {"at": "x"}}],
        [{"name": "b", "arguments": {}}],
        [{"name": "c", "arguments": {}}],
        [{"name": "a", "arguments": {}}] * 2,
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_definitions_that_contradict():
    tools = [
        Tool(type="function", function=Function(name=name, parameters={"$defs": {"p": {"type": kind}}}))
        for name, kind in (("a", "integer"), ("b", "string"))
    ]
    with pytest.raises(RequestError, match="'p' in two ways"):
        use(tools, "required", parallel=True).schema()


def test_turns_without_tools_are_left_alone():
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert spell_out(turns, []) == turns


FUNCTIONS = [WEATHER["function"], CLOCK["function"]]


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_call_of_the_older_form(stack, client, stream):
    stack.prefill.script.first_text = "So: "
    stack.worker.script.texts = [CALL, CALL]
    ask = {"model": "tiny", "messages": QUESTION, "functions": FUNCTIONS, "function_call": "auto"}
    if stream:
        chunks = list(client.chat.completions.create(**ask, stream=True))
        (call,) = [chunk.choices[0].delta.function_call for chunk in chunks if chunk.choices[0].delta.function_call]
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = client.chat.completions.create(**ask).choices[0]
        call, reason = choice.message.function_call, choice.finish_reason
        assert choice.message.tool_calls is None
    assert (call.name, json.loads(call.arguments)) == ("weather", {"town": "Ulm"})
    assert reason == "function_call"
    assert json.dumps(WEATHER["function"]) in prompt_of(stack)


def test_a_named_function_of_the_older_form(stack, client):
    say(stack, '{"town"', ': "Ulm"}')
    ask = {"model": "tiny", "messages": QUESTION, "functions": FUNCTIONS, "function_call": {"name": "weather"}}
    choice = client.chat.completions.create(**ask).choices[0]
    assert json.loads(choice.message.function_call.arguments) == {"town": "Ulm"}
    assert choice.finish_reason == "stop"
    assert json.loads(stack.worker.heard(Reserve)[0].sampling.json_schema) == PARAMETERS
    stack.chat(functions=FUNCTIONS, function_call="none")
    assert "weather" not in prompt_of(stack)


def test_a_conversation_of_the_older_form(stack):
    past = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"town": "Ulm"}'}}
    result = {"role": "function", "name": "weather", "content": "sunny"}
    assert stack.chat(messages=[*QUESTION, past, result], functions=FUNCTIONS).status_code == 200
    assert f"{CALL}</s><user><tool_response>\nsunny" in prompt_of(stack)
