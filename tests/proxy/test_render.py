"""Text to token ids, with the tiny tokenizer of the fixtures."""

from __future__ import annotations

import asyncio

import pytest

from proxy.render import Renderer
from tests.proxy.test_failures import error_of
from transfer.errors import ConfigError, RequestError
from transfer.messages import Reserve


def rendered(hf_dir, work):
    async def go():
        renderer = Renderer(str(hf_dir))
        await renderer.load()
        try:
            return await work(renderer), renderer
        finally:
            renderer.close()

    ids, renderer = asyncio.run(go())
    return ids, renderer._tokenizer


def test_chat_is_the_template_tokenized_without_more_special_tokens(hf_dir):
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "grüß dich"}]
    ids, tokenizer = rendered(hf_dir, lambda renderer: renderer.chat(turns))
    assert tokenizer.decode(ids) == "<system>be brief</s><user>grüß dich</s><assistant>"
    assert ids.count(tokenizer.eos_token_id) == 2


def test_text_and_ids_of_a_prompt(hf_dir):
    ids, tokenizer = rendered(hf_dir, lambda renderer: renderer.completion("ab"))
    assert tokenizer.decode(ids) == "ab"
    assert rendered(hf_dir, lambda renderer: renderer.completion(ids))[0] == ids


@pytest.mark.parametrize(("prompt", "says"), [([], "empty"), ([258], "258"), ([-1], "-1")])
def test_ids_outside_the_vocabulary(hf_dir, prompt, says):
    with pytest.raises(RequestError, match=says) as caught:
        rendered(hf_dir, lambda renderer: renderer.completion(prompt))
    assert caught.value.param == "prompt"


def test_a_template_that_refuses(hf_dir):
    with pytest.raises(RequestError, match="no such talk"):
        rendered(hf_dir, lambda renderer: renderer.chat([{"role": "user", "content": "refuse"}]))


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match=r"pair\.hf_dir"):
        rendered(tmp_path, lambda renderer: renderer.chat([]))


def test_what_the_template_is_called_with(stack):
    def prompt(**fields) -> str:
        stack.worker.said.clear()
        response = stack.chat({"X-Isthmus-Route": "cpu"}, **fields)
        assert response.status_code == 200, response.text
        return stack.gateway.renderer.vocabulary.text(stack.worker.heard(Reserve)[0].prompt)

    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I am"}]
    assert prompt(messages=begun) == "<user>hi</s><assistant>I am</s><assistant>"
    assert prompt(messages=begun, continue_final_message=True) == "<user>hi</s><assistant>I am"
    assert prompt(messages=begun, add_generation_prompt=False) == "<user>hi</s><assistant>I am</s>"
    tokenizer = stack.gateway.renderer._tokenizer
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template + "{{ mood }}"
        assert prompt(chat_template_kwargs={"mood": "calm"}) == "<user>hi</s><assistant>calm"
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("continue_final_message", {"continue_final_message": True, "add_generation_prompt": True}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"tokenize": True}}),
        ("chat_template_kwargs", {"chat_template_kwargs": 5}),
    ],
)
def test_what_contradicts_is_named(stack, field, fields):
    assert error_of(stack.chat(**fields), 400)["param"] == field
