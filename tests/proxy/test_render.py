"""Text to token ids, with the tiny tokenizer of the fixtures."""

from __future__ import annotations

import asyncio

import pytest

from proxy.render import Renderer
from transfer.errors import ConfigError, RequestError


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
