"""Real llama.cpp samplers over a real model: each parameter does what it says, and only that."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from cpu_decode.logprobs import token_logprob
from tests.cpu_decode.asking import END, PROMPT, ask
from tests.cpu_decode.native_kv import prefill
from transfer.errors import RequestError
from transfer.messages import Sampling

GREEDY = Sampling(max_tokens=8, temperature=0.0)
HOT = Sampling(max_tokens=8, temperature=1.5, seed=11, ignore_eos=True)
# " world" wins every step, "Hello" comes second.
FORCED = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True, logit_bias={905: 100.0, 19556: 80.0})


def but(sampling: Sampling, **changes: object) -> Sampling:
    return msgspec.structs.replace(sampling, **changes)


def test_the_end_is_impossible_before_min_tokens(running):
    eager = but(GREEDY, logit_bias={END: 100.0})
    assert ask(running, eager).ids == [END]
    patient = ask(running, but(eager, min_tokens=5))
    assert patient.ids.index(END) == 5
    assert patient.finish_reason == "stop"


def test_biases_that_only_lower_leave_the_likeliest_of_the_rest(running, context):
    first, second, *_, tenth = np.argsort(-prefill(context, 0, PROMPT))[:10].tolist()
    one = but(GREEDY, max_tokens=1)
    assert ask(running, one).ids == [first]
    assert ask(running, but(one, logit_bias={tenth: -100.0})).ids == [first]
    assert ask(running, but(one, logit_bias={first: -100.0, tenth: 0.0})).ids == [second]
    assert ask(running, but(one, logit_bias={first: -100.0, tenth: 100.0})).ids == [tenth]
    assert ask(running, but(one, logit_bias={first: -100.0, second: -200.0})).ids not in ([first], [second])


def test_prior_output_counts_for_the_penalties_of_output(running):
    penalized = but(FORCED, max_tokens=1, frequency_penalty=8.0, logit_bias={905: 100.0, 19556: 88.0})
    prompt = [*PROMPT, 905, 905, 905, 905]
    assert ask(running, penalized, prompt).ids == [905]
    assert ask(running, penalized, prompt, prior_output=4).ids == [19556]


def test_a_stop_token_ends_the_answer_and_is_no_text(running):
    answer = ask(running, but(FORCED, stop_token_ids=(905,)))
    assert (answer.ids, answer.text, answer.finish_reason) == ([905], "", "stop")


def test_a_stop_token_is_impossible_before_min_tokens(running):
    answer = ask(running, but(FORCED, stop_token_ids=(905,), min_tokens=3))
    assert (answer.ids, answer.text) == ([19556] * 3 + [905], "Hello" * 3)


def test_stop_strings_count_behind_min_tokens_only(running):
    answer = ask(running, but(FORCED, stop=("world",), min_tokens=3))
    assert (answer.ids, answer.text, answer.finish_reason) == ([905] * 4, " world" * 3 + " ", "stop")


def test_dry_breaks_a_loop_that_nothing_else_breaks(running):
    assert ask(running, FORCED).ids == [905] * 8
    dry = ask(running, but(FORCED, dry_multiplier=20.0, dry_sequence_breakers=()))
    assert {905, 19556} <= set(dry.ids)


def test_dry_looks_at_the_prompt_and_stops_at_breakers(running):
    looping = [*PROMPT, *[905] * 6]
    dry = but(FORCED, max_tokens=1, dry_multiplier=50.0, dry_sequence_breakers=())
    assert ask(running, dry, looping).ids == [19556]
    assert ask(running, but(dry, dry_sequence_breakers=(" world",)), looping).ids == [905]
    assert ask(running, but(dry, dry_penalty_last_n=0), looping).ids == [905]


def test_xtc_takes_the_likeliest_of_two_away(running):
    two = but(HOT, top_k=2, logprobs=2, xtc_probability=1.0, xtc_threshold=0.0)
    assert all(entry.token == entry.top[1][0] for entry in ask(running, two).logprobs)
    never = but(two, xtc_probability=0.0)
    assert any(entry.token == entry.top[0][0] for entry in ask(running, never).logprobs)
    # Only what is as likely as the threshold can be taken away, and two tokens are never both likelier than a half.
    assert ask(running, but(two, xtc_threshold=1.0)).ids == ask(running, never).ids


def test_typical_sampling_keeps_what_is_as_likely_as_expected(running, context):
    """With the definition of locally typical sampling (Meister et al., 2022) worked out in numpy."""
    surprising = [1]
    logits = prefill(context, 0, surprising).astype(np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    surprise = -np.log(p)
    order = np.argsort(np.abs(surprise - (p * surprise).sum()))
    kept = set(order[: int((np.cumsum(p[order]) > 0.5).argmax()) + 1].tolist())
    sampling = Sampling(max_tokens=1, temperature=1.0, typical_p=0.5)
    drawn = {ask(running, but(sampling, seed=seed), surprising).ids[0] for seed in range(12)}
    assert drawn <= kept
    assert len(drawn) > 1


def test_logprobs_are_those_of_the_model_whatever_is_sampled(running, context):
    expected = prefill(context, 0, PROMPT).astype(np.float64)
    expected -= np.log(np.exp(expected).sum())
    for sampling in (GREEDY, HOT, but(FORCED, repetition_penalty=1.3), but(HOT, min_tokens=8)):
        answer = ask(running, but(sampling, logprobs=3))
        assert [entry.token for entry in answer.logprobs] == answer.ids
        first = answer.logprobs[0]
        assert first.logprob == pytest.approx(expected[first.token], abs=0.02)
        best = np.argsort(-expected)[:3]
        assert [token for token, _ in first.top] == best.tolist()
        assert [logprob for _, logprob in first.top] == pytest.approx(expected[best].tolist(), abs=0.02)


def test_logprobs_come_with_their_tokens_when_text_is_held_back(running):
    held = ask(running, but(FORCED, stop=(" world world world world world world world world !",), logprobs=0))
    assert len(held.logprobs) == len(held.ids) == 8
    assert all(entry.top == () for entry in held.logprobs)
    assert ask(running, FORCED).logprobs == []


def test_a_first_token_from_elsewhere_has_no_logprob(running):
    ticket = running.client.reserve(PROMPT, but(GREEDY, logprobs=1), "local")
    running.client.start(ticket, 905)
    ids, logprobs = [], []
    while True:
        message = running.client.next_tokens(ticket)
        ids += message.token_ids
        logprobs += message.logprobs
        if message.finish_reason:
            break
    assert [entry.token for entry in logprobs] == ids[1:]


def test_log_probabilities_survive_impossible_tokens():
    logits = np.array([1.0, -np.inf, 3.0, 2.0], np.float32)
    entry = token_logprob(logits, 2, 2)
    total = math.log(math.exp(1) + math.exp(2) + math.exp(3))
    assert entry.logprob == pytest.approx(3 - total, rel=1e-5)
    assert [token for token, _ in entry.top] == [2, 3]
    assert token_logprob(logits, 1, 4).logprob == -math.inf


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"stop_token_ids": (49_152,)}, "stop_token_ids"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"temperature": math.nan}, "temperature"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"typical_p": 0.0}, "typical_p"),
        ({"xtc_probability": 1.5}, "xtc_probability"),
        ({"dry_sequence_breakers": ("a",) * 17}, "dry_sequence_breakers"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_what_llama_cpp_would_choke_on_is_refused_by_name(running, changes, param):
    with pytest.raises(RequestError, match=param):
        ask(running, but(GREEDY, **changes))
