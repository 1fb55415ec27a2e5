"""Text to ids and back over HTTP, in vLLM's forms."""

from __future__ import annotations

import pytest

from tests.proxy.test_failures import error_of
from transfer.messages import Reserve


def test_a_text_and_back(stack):
    found = stack.http.post("/tokenize", json={"prompt": "grüß", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len("grüß".encode())
    assert found["max_model_len"] == 201
    assert found["token_strs"][:2] == ["g", "r"]
    assert stack.http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "grüß"}


def test_a_conversation_is_what_chat_sends(stack):
    messages = [{"role": "user", "content": "hi"}]
    found = stack.http.post("/tokenize", json={"model": "tiny", "messages": messages}).json()
    stack.chat(messages=messages)
    assert stack.worker.heard(Reserve)[0].prompt == found["tokens"]
    bare = stack.http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert stack.gateway.renderer.vocabulary.text(bare["tokens"]) == "<user>hi</s>"


def test_what_clients_that_render_themselves_ask(stack):
    found = stack.http.get("/tokenizer_info").json()
    assert (found["eos_token"], found["bos_token"], found["unk_token"]) == ("</s>", None, "<unk>")
    assert found["chat_template"] == stack.gateway.renderer._tokenizer.chat_template
    assert found["model_max_length"] == 201


def test_nothing_to_tokenize_is_nothing(stack):
    assert stack.http.post("/tokenize", json={"prompt": ""}).json()["count"] == 0


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {"tokens": [258]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
    ],
)
def test_what_is_wrong_is_named(stack, path, body, param):
    assert error_of(stack.http.post(path, json=body), 400)["param"] == param
