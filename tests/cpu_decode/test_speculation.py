"""A real worker that always guesses answers as one that never does, whatever the request asks for.

With bf16 cells, whose logits do not depend on where they lie. A batch of another size rounds a little differently, and
how differently depends on the processor: answers are compared to prompts that leave the model no doubt.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cpu_decode import calibration
from cpu_decode.batching import Batching
from cpu_decode.draft import DraftModel, require_same_vocabulary
from cpu_decode.llama import Batch, Context
from cpu_decode.reuse import Plan
from cpu_decode.sampling import Sampler
from cpu_decode.sequence import Sequence
from cpu_decode.speculate import Guessing
from tests.cpu_decode.asking import PROMPT, ask, ask_for_choices, gather
from tests.cpu_decode.native_kv import prefill
from tests.cpu_decode.serving import MAX_SEQUENCES, Running, serving
from tests.cpu_decode.test_worker import eventually
from transfer.errors import ConfigError
from transfer.messages import Failure, Reserve, Sampling, TokenLogprob, Tokens


def but(sampling: Sampling, **changes: object) -> Sampling:
    return msgspec.structs.replace(sampling, **changes)


GREEDY = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
# " world" always wins: every guess is right, and the limits of an answer come in the middle of guesses.
FORCED = Sampling(max_tokens=23, temperature=0.0, ignore_eos=True, logit_bias={905: 100.0, 19556: 80.0})
SCHEMA = json.dumps({"type": "array", "items": {"enum": [7]}, "minItems": 9, "maxItems": 9})
# Two tokens by turns of a coin, so that guesses are often right and often wrong.
COIN = but(FORCED, temperature=20.0, seed=3, top_k=2, logit_bias={905: 100.0, 19556: 100.0})
# A text that says everything twice.
COPIED = [*range(1000, 1040), *range(1000, 1030)]
# The likeliest token of 24 leads the next by 1.7 at least in log probability; a batch of another size moves it by 0.1.
CLEAR = {
    "counting": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18,",
    "in tens": "10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140,",
    "copied": "a1 b2 c3 d4 e5 f6 g7 h8 i9 a1 b2 c3 d4 e5 f6 g7 h8 i9 a1 b2 c3",
}


@pytest.fixture(scope="module")
def guessing(model, geometry) -> Iterator[Running]:
    with serving(model, geometry, "bf16", speculate="always", speculate_tokens=5) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_leaks(guessing):
    yield
    eventually(lambda: guessing.client.status().used_cells == 0)
    assert all(guessing.context.cached_tokens(seq_id) == 0 for seq_id in range(MAX_SEQUENCES + 1))


@pytest.fixture(scope="module")
def clear(model) -> dict[str, list[int]]:
    return {name: model.tokenize(text.encode()) for name, text in CLEAR.items()}


@pytest.mark.parametrize("name", CLEAR)
def test_greedy_answers_are_the_same_word_for_word(running, guessing, clear, name):
    prompt = clear[name]
    plain, _ = ask_for_choices(running, GREEDY, 1, prompt)
    guessed, report = ask_for_choices(guessing, GREEDY, 1, prompt)
    assert guessed == plain
    assert report.completion_tokens == GREEDY.max_tokens
    assert report.drafted_tokens >= report.accepted_tokens


def test_what_is_guessed_right_takes_fewer_steps(guessing):
    before = guessing.client.status()
    answers, report = ask_for_choices(guessing, FORCED, 1)
    assert answers[0].ids == [905] * 23
    # Two tokens to see a loop; then five guesses and one more token a step, the last ones cut by max_tokens.
    assert report.accepted_tokens >= 15
    after = guessing.client.status()
    assert after.drafted_tokens - before.drafted_tokens == report.drafted_tokens
    assert after.accepted_tokens - before.accepted_tokens == report.accepted_tokens


@pytest.mark.parametrize(
    "sampling",
    [
        but(FORCED, max_tokens=6),
        but(FORCED, stop=("d world w",), min_tokens=9),
        but(FORCED, stop_token_ids=(905,), min_tokens=6),
        but(FORCED, frequency_penalty=2.0, max_tokens=30),
        but(FORCED, repetition_penalty=1.5),
        but(FORCED, dry_multiplier=20.0, dry_sequence_breakers=()),
        COIN,
        but(COIN, seed=4, xtc_probability=0.2, xtc_threshold=0.01),
        Sampling(max_tokens=40, temperature=0.0, json_schema=SCHEMA),
        Sampling(max_tokens=24, temperature=0.0, grammar='root ::= "{}"'.format("abc" * 9)),
    ],
    ids=lambda sampling: next(
        (key for key in ("stop", "stop_token_ids", "frequency_penalty", "repetition_penalty", "dry_multiplier",
                         "xtc_probability", "json_schema", "grammar", "seed", "max_tokens")
         if getattr(sampling, key) != getattr(FORCED, key)), "all"),
)  # fmt: skip
def test_whatever_a_request_asks_for_holds(running, guessing, sampling):
    plain, _ = ask_for_choices(running, sampling, 1)
    guessed, report = ask_for_choices(guessing, sampling, 1)
    assert guessed == plain
    assert report.drafted_tokens > 0


def test_log_probabilities_are_those_of_their_rows(running, guessing):
    plain, guessed = (ask(each, but(FORCED, logprobs=2)) for each in (running, guessing))
    assert guessed.ids == plain.ids
    assert len(guessed.logprobs) == len(plain.logprobs) == 23
    for one, other in zip(guessed.logprobs, plain.logprobs, strict=True):
        assert close(one, other)


def close(one: TokenLogprob, other: TokenLogprob) -> bool:
    return one.token == other.token and abs(one.logprob - other.logprob) < 0.05


def test_choices_guess_each_for_itself(running, guessing):
    plain, _ = ask_for_choices(running, COIN, 3)
    guessed, report = ask_for_choices(guessing, COIN, 3)
    assert guessed == plain
    assert len({tuple(answer.ids) for answer in guessed}) == 3
    assert report.accepted_tokens > 0


def test_choices_of_a_prompt_that_is_there_already(model, geometry):
    with serving(model, geometry, "bf16", speculate="always", pool_mib=16) as keeping:
        first, _ = ask_for_choices(keeping, FORCED, 3, COPIED)
        # All but the last token is reused: choices fork in a step that looks like one of a running answer.
        again, report = ask_for_choices(keeping, FORCED, 3, COPIED)
    assert [answer.ids for answer in again] == [answer.ids for answer in first]
    assert report.kv_reused_tokens == len(COPIED) - 1


def test_several_at_once_answer_as_one_by_one(guessing, clear):
    alone = [ask(guessing, GREEDY, prompt) for prompt in clear.values()]
    tickets = [guessing.client.reserve(prompt, GREEDY, "local") for prompt in clear.values()]
    for ticket in tickets:
        guessing.client.start(ticket)
    for ticket, expected in zip(tickets, alone, strict=True):
        assert gather(guessing, ticket, 1)[0][0] == expected


def test_every_token_is_the_likeliest_of_the_model_or_as_good_as_that(guessing, context):
    answer = ask(guessing, but(GREEDY, max_tokens=9), COPIED)
    tokens = list(COPIED)
    for token in answer.ids:
        logits = prefill(context, 0, tokens)
        context.trim(0, 0)
        assert logits.max() - logits[token] < 0.1
        tokens.append(token)


def test_with_quantized_cells_greedy_answers_are_the_same_too(model, geometry, clear):
    with (
        serving(model, geometry, "q8_0") as plain,
        serving(model, geometry, "q8_0", speculate="always", speculate_tokens=5) as guessing,
    ):
        for prompt in clear.values():
            expected, _ = ask_for_choices(plain, GREEDY, 1, prompt)
            answer, report = ask_for_choices(guessing, GREEDY, 1, prompt)
            assert answer == expected
        assert report.accepted_tokens > 0


def test_a_draft_model_guesses_what_it_would_say_itself(running, model, geometry, default_pair, clear):
    draft = DraftModel(Path(default_pair.gguf), model, max_sequences=MAX_SEQUENCES, threads=1)
    cpu = max(os.sched_getaffinity(0))
    draft.pin([cpu], [cpu])
    with serving(model, geometry, "bf16", speculate="always", speculate_tokens=4, draft=draft) as drafting:
        plain, _ = ask_for_choices(running, GREEDY, 1, clear["counting"])
        guessed, report = ask_for_choices(drafting, GREEDY, 1, clear["counting"])
        assert guessed == plain
        # The same weights: what it has not seen of the prompt, and other rounding, make it err now and then.
        assert report.accepted_tokens >= report.drafted_tokens // 2 > 0
        again, _ = ask_for_choices(drafting, GREEDY, 1, clear["copied"])
        assert again == ask_for_choices(running, GREEDY, 1, clear["copied"])[0]
    assert draft._seen == {}
    draft.close()


class Vocabulary:
    """As much of a model as is compared."""

    def __init__(self, *pieces: bytes) -> None:
        self.vocab_size = len(pieces)
        self.piece = pieces.__getitem__


def test_a_draft_model_of_another_vocabulary_is_refused_by_name():
    gguf, target = Path("small.gguf"), Vocabulary(b"a", b"b")
    require_same_vocabulary(target, Vocabulary(b"a", b"b"), gguf)
    with pytest.raises(ConfigError, match=r"3 tokens, the model 2: small.gguf .* at \[decode\] draft_gguf"):
        require_same_vocabulary(target, Vocabulary(b"a", b"b", b"c"), gguf)
    with pytest.raises(ConfigError, match=r"token 1 is b'c' there and b'b' here"):
        require_same_vocabulary(target, Vocabulary(b"a", b"c"), gguf)


@pytest.mark.parametrize(("row_cost", "guesses"), [(1.0, False), (0.02, True)])
def test_automatic_guessing_follows_the_cost_of_rows(context, row_cost, guesses):
    row_ns = {rows: 1e6 * (1 + row_cost * (rows - 1)) for rows in (1, 2, 3, 4, 6, 8, 12)}
    messages: list[Tokens | Failure] = []
    guessing = Guessing("auto", row_ns=row_ns)
    engine = Batching(
        context,
        batch_tokens=64,
        emit=lambda _: None,
        answer=lambda _, message: messages.append(message),
        guessing=guessing,
    )
    engine.calibrate()
    reserve = Reserve(request_id="r", prompt=PROMPT, sampling=FORCED, source="local")
    engine.admit(Sequence(reserve, 0, Sampler(context.model, reserve)), Plan())
    engine.begin("r", None, False, 0)
    while engine._running:
        engine.step()
        engine.learn()
    (last,) = (message for message in messages if isinstance(message, Tokens) and message.report)
    assert last.report.completion_tokens == FORCED.max_tokens
    assert (last.report.drafted_tokens > 0) == guesses
    assert engine.meter.pace().step_ns > 0


def test_batches_are_timed_and_leave_no_cell_behind(context: Context):
    speed = calibration.measure(context, Batch(64), (1, 2, 8))
    assert sorted(speed.row_ns) == [1, 2, 8]
    assert all(ns > 0 for ns in speed.row_ns.values())
    assert context.cached_tokens(0) == 0
