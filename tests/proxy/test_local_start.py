"""A prompt that is all but there needs no vLLM."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.costs import PrefillTime
from proxy.router import ALWAYS_LOCAL_TOKENS, computes_the_rest
from tests.proxy.fake_worker import LANDING
from transfer.messages import Reserve, Start, Status, Ticket

PROMPT_TOKENS = 1000
STATUS = Status(
    worker="w",
    used_cells=0,
    num_cells=1,
    running_sequences=0,
    reserved_sequences=0,
    max_sequences=1,
    landing_bytes=0,
    prefill_tokens_per_s=100.0,
    prefill_basis="measured",
)


def ticket(missing_tokens: int) -> Ticket:
    return Ticket(
        request_id="r",
        ticket="00",
        kv_endpoint="tcp://127.0.0.1:1",
        codec="raw",
        landing=LANDING,
        chunk_tokens=512,
        credit_chunks=1,
        deadline_ms=1000,
        reused_tokens=PROMPT_TOKENS - missing_tokens,
    )


def learned(*observations: tuple[int, int]) -> PrefillTime:
    time = PrefillTime()
    for new_tokens, took_ns in observations:
        time.observe(new_tokens, took_ns)
    return time


def test_a_few_missing_tokens_are_computed_where_they_are_needed():
    assert computes_the_rest(ticket(ALWAYS_LOCAL_TOKENS), PROMPT_TOKENS, None, PrefillTime())
    assert not computes_the_rest(ticket(ALWAYS_LOCAL_TOKENS + 1), PROMPT_TOKENS, None, PrefillTime())


def test_nothing_is_decided_for_a_prompt_that_is_new():
    assert not computes_the_rest(ticket(PROMPT_TOKENS), PROMPT_TOKENS, STATUS, learned((1, 10**12)))
    # Not even for a very short one.
    assert not computes_the_rest(ticket(PROMPT_TOKENS), 1, STATUS, PrefillTime())


@pytest.mark.parametrize(("vllm_s", "local"), [(0.9, False), (1.1, True)])
def test_more_of_them_go_where_they_take_less_time(vllm_s, local):
    """100 tokens take the worker one second."""
    vllm = learned(*[(100, round(vllm_s * 1e9))] * 3)
    assert computes_the_rest(ticket(100), PROMPT_TOKENS, STATUS, vllm) is local
    assert not computes_the_rest(ticket(100), PROMPT_TOKENS, None, vllm)
    assert not computes_the_rest(ticket(100), PROMPT_TOKENS, STATUS, PrefillTime())


@given(
    st.integers(0, 10**9),
    st.integers(0, 10**7),
    st.lists(st.integers(1, 10_000), min_size=2, max_size=30),
    st.integers(1, 10_000),
)
def test_a_line_is_learned(fixed_ns, token_ns, lengths, asked):
    time = learned(*((tokens, fixed_ns + token_ns * tokens) for tokens in lengths))
    guess_ns = time.ns(asked)
    if max(lengths) - min(lengths) > 100:
        assert guess_ns == pytest.approx(fixed_ns + token_ns * asked, rel=0.01, abs=1e6)
    else:
        assert guess_ns >= 0


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 10**11)), min_size=1, max_size=30))
def test_whatever_is_observed_more_tokens_take_no_less_time(observations):
    time = learned(*observations)
    guesses = [time.ns(tokens) for tokens in (0, 1, 100, 10_000)]
    assert guesses == sorted(guesses)
    assert guesses[0] >= -1


def test_what_is_long_ago_is_forgotten():
    time = learned(*[(100, 10**9)] * 50, *[(100, 10**8)] * 50)
    assert time.ns(100) == pytest.approx(10**8, rel=0.1)
    assert PrefillTime().ns(1) is None


def test_vllm_is_not_asked_for_the_rest_of_a_cached_prompt(stack):
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
