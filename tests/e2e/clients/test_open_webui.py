"""The requests that Open WebUI sends, replayed in its order: its own package is too large for a test.

As its source has them (https://github.com/open-webui/open-webui, ``backend/open_webui/routers/openai.py`` and
``tasks.py``): the list of models, a streamed answer with usage and the parameters of its settings, then, after the
answer, title, tags and follow-ups without a stream; and a stream that is closed by the stop button.
"""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.engines

HEADERS = {
    "Authorization": "Bearer none",
    "Content-Type": "application/json",
    "X-OpenWebUI-User-Name": "Ada",
    "X-OpenWebUI-User-Id": "1",
    "X-OpenWebUI-User-Email": "ada@example.org",
    "X-OpenWebUI-User-Role": "admin",
    "X-OpenWebUI-Chat-Id": "c",
}
SETTINGS = {
    "temperature": 0.2,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.0,
    "frequency_penalty": 0,
    "presence_penalty": 0.1,
    "repeat_penalty": 1.1,
    "seed": 7,
    "stop": ["\n\n\n"],
    "logit_bias": {"5": -100},
    "max_tokens": 16,
    "reasoning_effort": "low",
    "reasoning": {"effort": "low"},
    "keep_alive": "5m",
    # Of models that are pipelines, and what the page's own fields leave behind.
    "user": {"name": "Ada", "id": "1", "email": "ada@example.org", "role": "admin"},
    "chat_id": "c",
    "session_id": "s",
    "metadata": {"chat_id": "c", "features": {"web_search": False}},
    "files": None,
    "features": {},
    "variables": {"{{USER_NAME}}": "Ada"},
}
TASKS = ("Write a title with an emoji.", "Write three tags as JSON.", "Suggest follow-up questions as JSON.")


def ask(http: httpx.Client, model: str, messages: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    body = {"model": model, "messages": messages, "stream": True, "stream_options": {"include_usage": True}, **more}
    with http.stream("POST", "/v1/chat/completions", content=json.dumps(body), headers=HEADERS) as response:
        assert response.status_code == 200, response.read()
        assert "text/event-stream" in response.headers["Content-Type"]
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_chat_as_open_webui_has_it(http: httpx.Client):
    listed = http.get("/v1/models", headers=HEADERS).json()
    model = listed["data"][0]["id"]
    assert listed["object"] == "list"
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Say yes.", "cache_control": {"type": "ephemeral"}}]},
    ]
    chunks = ask(http, model, messages, **SETTINGS)
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    assert text
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Again."}]
    assert ask(http, model, messages, max_tokens=4)
    for task in TASKS:
        body = {"model": model, "messages": [{"role": "user", "content": task}], "stream": False}
        body |= {"max_completion_tokens": 8, "metadata": {"task": "title_generation", "chat_id": "c"}}
        answer = http.post("/v1/chat/completions", content=json.dumps(body), headers=HEADERS)
        assert answer.status_code == 200, answer.text
        assert "content" in answer.json()["choices"][0]["message"]


def test_tools_as_open_webui_offers_them(http: httpx.Client):
    model = http.get("/v1/models").json()["data"][0]["id"]
    parameters = {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}
    tools = [{"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": parameters}}]
    messages = [{"role": "user", "content": "How is the weather in Ulm?"}]
    assert ask(http, model, messages, tools=tools, max_tokens=16)[-1]["usage"]
    call = {"id": "c1", "index": 0, "type": "function", "function": {"name": "weather", "arguments": '{"town": "Ulm"}'}}
    messages += [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    assert ask(http, model, messages, tools=tools, max_tokens=8)[-1]["usage"]


def test_the_stop_button(http: httpx.Client):
    model = http.get("/v1/models").json()["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": "Tell me a story."}], "stream": True}
    body |= {"max_tokens": 1500, "ignore_eos": True}
    with http.stream("POST", "/v1/chat/completions", json=body, headers=HEADERS) as response:
        lines = response.iter_lines()
        for _ in range(6):
            next(lines)
    deadline = time.monotonic() + 20
    while http.get("/ledger?last=1").json()["entries"][-1]["status"] != "cancelled":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert 'isthmus_requests_total{status="cancelled"}' in http.get("/metrics").text
