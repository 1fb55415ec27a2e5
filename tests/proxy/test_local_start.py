"""A prompt that is all but there needs no vLLM."""

from __future__ import annotations

from proxy.estimates import Estimates
from transfer.messages import Reserve, Start


def test_vllm_is_not_asked_for_the_rest_of_a_cached_prompt(stack):
    stack.gateway.dispatcher.planner.estimates = Estimates()
    stack.worker.script.reused_tokens = 19
    answer = stack.chat(isthmus=True).json()
    assert answer["choices"][0]["message"]["content"] == "one two three"
    assert answer["usage"]["prompt_tokens"] == 20
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 19
    assert not stack.prefill.bodies
    assert stack.worker.heard(Reserve)[0].source == "kv"
    assert stack.worker.heard(Start) == [Start(request_id=answer["isthmus"]["request_id"], local=True)]
    entry = answer["isthmus"]
    assert (entry["route"], entry["reason"], entry["codec"], entry["failed_over"]) == ("cpu", "cached", None, None)


def test_a_forced_split_is_one(stack):
    stack.worker.script.reused_tokens = 19
    assert stack.chat({"X-Isthmus-Route": "split"}).status_code == 200
    assert len(stack.prefill.bodies) == 1
    assert stack.entries()[0]["route"] == "split"
