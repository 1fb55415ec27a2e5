"""A prompt that begins like an earlier one moves only what is new, and is answered the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import ModelPair
from tests.e2e.conftest import Running, running_stack
from tests.e2e.test_stack import chat, text_of

pytestmark = pytest.mark.engines

BYTES_PER_TOKEN = 2 * 30 * 3 * 128


@pytest.fixture(scope="module")
def stack(default_pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A stack of its own, that keeps KV."""
    with running_stack(default_pair, tmp_path_factory, 256) as running:
        yield running


def reused(answer: dict[str, Any]) -> int:
    entry = answer["isthmus"]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= entry["kv_reused_tokens"]
    # What is sent is what the cells lack, unless the worker computes that itself.
    assert entry["kv_raw_bytes"] in (0, (entry["prompt_tokens"] - entry["kv_reused_tokens"]) * BYTES_PER_TOKEN)
    return entry["kv_reused_tokens"]


@pytest.mark.parametrize("route", ["split", "cpu"])
def test_the_same_prompt_again_moves_at_most_its_last_token(http: httpx.Client, shipped_text: str, route: str):
    prompt = f"Route {route}. {shipped_text}"
    first, again = (chat(http, prompt, route) for _ in range(2))
    assert reused(first) < 100
    assert reused(again) == again["usage"]["prompt_tokens"] - 1
    assert again["isthmus"]["kv_wire_bytes"] <= first["isthmus"]["kv_wire_bytes"] // 100
    assert text_of(again) == text_of(first)


def test_a_follow_up_moves_the_new_text_only(http: httpx.Client, shipped_text: str):
    question = {"role": "user", "content": "In short. " + shipped_text}
    first = chat(http, "", "split", messages=[question])
    turns = [question, {"role": "assistant", "content": text_of(first)}]
    follow_up = "Now tell me at some length what the boat looked like, who was on it and where it went after that. " * 3
    second = chat(http, "", "split", messages=[*turns, {"role": "user", "content": follow_up}])
    assert reused(second) >= first["usage"]["prompt_tokens"] - 1
    assert second["usage"]["prompt_tokens"] > reused(second) + 32
