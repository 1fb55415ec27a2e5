"""Constrained output: what comes always matches, whoever shares the batch, and bad constraints harm nobody."""

from __future__ import annotations

import json
import re

import jsonschema
import msgspec
import numpy as np
import pytest

from cpu_decode.grammar import MAX_GRAMMAR_BYTES, MAX_SCHEMA_BYTES, Grammars
from tests.cpu_decode.asking import PROMPT, ask, ask_for_choices, gather
from transfer.errors import ProtocolError, RequestError
from transfer.messages import Reserve, Sampling

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["tea", "ale"]}, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
CHOICE = {"anyOf": [{"const": "yes"}, {"type": "boolean"}, {"type": "null"}]}
FREE = Sampling(max_tokens=120, temperature=1.0, seed=1)
DATE = 'root ::= year "-" [0-1] [0-9]\nyear ::= ("19" | "20") [0-9]{2}'


def but(sampling: Sampling, **changes: object) -> Sampling:
    return msgspec.structs.replace(sampling, **changes)


@pytest.fixture(scope="module")
def grammars(model) -> Grammars:
    return Grammars(model)


def read(grammars: Grammars, prompt: list[int] | None = None, prior_output: int = 0, **constraint: str):  # type: ignore[no-untyped-def]
    sampling = Sampling(max_tokens=9, **constraint)
    prompt = prompt or PROMPT
    return grammars.read(
        Reserve(request_id="r", prompt=prompt, sampling=sampling, source="local", prior_output=prior_output)
    )


@pytest.mark.parametrize(
    ("schema", "temperature", "seed"),
    # A hotter model may run out of tokens before it closes its object.
    [(PERSON, 0.0, None), (PERSON, 1.0, 1), (PERSON, 1.0, 2), (CHOICE, 0.0, None), (CHOICE, 1.5, 1), (CHOICE, 3.0, 2)],
)
def test_output_parses_and_obeys_its_schema(running, schema, temperature, seed):
    answer = ask(running, but(FREE, temperature=temperature, seed=seed, json_schema=json.dumps(schema)))
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.text), schema)


def test_output_obeys_a_gbnf_grammar(running):
    for seed in range(3):
        answer = ask(running, but(FREE, temperature=2.0, seed=seed, grammar=DATE))
        assert re.fullmatch(r"(19|20)\d\d-[01]\d", answer.text)


def test_output_obeys_a_regular_expression(running):
    for seed in range(3):
        answer = ask(running, but(FREE, temperature=2.0, seed=seed, regex=r"[ab]{2}|c\.d (e)"))
        assert re.fullmatch(r"[ab]{2}|c\.d (e)", answer.text)
        assert answer.finish_reason == "stop"


def test_output_obeys_a_lark_grammar(running):
    answer = ask(running, but(FREE, temperature=2.0, grammar='start: WORD "!"\nWORD: /[xy]{3}/'))
    assert re.fullmatch("[xy]{3}!", answer.text)


def test_a_grammar_ends_the_answer_whatever_else_is_wished(running):
    answer = ask(running, but(FREE, grammar='root ::= "a" | "b"', ignore_eos=True, min_tokens=20))
    assert answer.text in {"a", "b"}
    assert answer.finish_reason == "stop"


def test_batch_mates_are_unaffected(running):
    plain = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
    constrained = but(plain, max_tokens=40, ignore_eos=False, json_schema=json.dumps(PERSON))
    # The same two in one batch, with and without the grammar of one of them.
    texts = []
    for mate in (constrained, but(plain, max_tokens=40)):
        tickets = [running.client.reserve(PROMPT, sampling, "local") for sampling in (plain, mate)]
        for ticket in tickets:
            running.client.start(ticket)
        answers = [gather(running, ticket, 1)[0][0] for ticket in tickets]
        texts.append(answers[0].text)
    assert texts[0] == texts[1]


def test_choices_obey_their_grammar_each_in_its_own_state(running):
    answers, _ = ask_for_choices(running, but(FREE, temperature=2.0, grammar=DATE, logprobs=2), 3)
    assert all(re.fullmatch(r"(19|20)\d\d-[01]\d", answer.text) for answer in answers)
    # Log probabilities are the model's own, and all choices sample their first token from one prediction.
    assert len({answer.logprobs[0].top for answer in answers}) == 1
    assert answers[0].logprobs[0].top[0][0] not in [answer.ids[0] for answer in answers]


def test_a_first_token_cannot_come_with_a_grammar(running):
    ticket = running.client.reserve(PROMPT, but(FREE, grammar=DATE), "local")
    running.client.start(ticket, 905)
    with pytest.raises(ProtocolError, match="start without it"):
        running.client.collect(ticket)
    running.client.abort(ticket)


def test_prior_output_moves_the_grammar_on(grammars, model):
    prompt = [*PROMPT, *model.tokenize(b"19")]
    grammar = read(grammars, prompt, len(prompt) - len(PROMPT), grammar=DATE)
    allowed = {model.piece(int(token)) for token in np.flatnonzero(grammar.allowed())}
    assert allowed == {str(digit).encode() for digit in range(10)}
    with pytest.raises(RequestError, match="cannot be followed"):
        read(grammars, [*PROMPT, 905], 1, grammar=DATE)


def test_copies_go_their_own_ways(grammars, model):
    one = read(grammars, grammar='root ::= "ab" | "ba"')
    other = one.copy()
    (a,), (b,) = model.tokenize(b"a"), model.tokenize(b"b")
    one.accept(a)
    assert other.allowed()[b]
    assert not one.allowed()[a]
    one.accept(b)
    assert one.complete
    assert not other.complete


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "JSON object"),
        ("false", "JSON object"),
        ('{"type": "strang"}', "strang"),
        ('{"$ref": "#/nowhere"}', "nowhere"),
        ('{"$ref": "http://example.org/x"}', "example.org"),
        ('{"type": "string", "pattern": "("}', "unclosed group"),
        ('{"not": {"type": "string"}}', "not"),
        ('{"properties": {"a": ' * 5000 + "{}" + "}}" * 5000, "longer than|recursion"),
        ('{"properties": {"a": ' * 400 + "{}" + "}}" * 400, "recursion"),
        ('{"enum": ["' + "x" * MAX_SCHEMA_BYTES + '"]}', "longer than 64 KiB"),
    ],
)
def test_a_bad_schema_is_refused_with_the_reason(grammars, schema, reason):
    with pytest.raises(RequestError, match=reason) as refusal:
        read(grammars, json_schema=schema)
    assert refusal.value.param == "response_format"


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ('root ::= "a', "end of input"),
        ("root ::= nowhere", "nowhere"),
        ('branch ::= "a"', "root"),
        ("root ::= " + "(" * 3000 + '"a"' + ")" * 3000, "grammar"),
        ('root ::= "' + "x" * MAX_GRAMMAR_BYTES + '"', "longer than 16 KiB"),
        ("\x00\xff", "grammar"),
    ],
)
def test_a_bad_grammar_is_refused_with_the_reason(grammars, grammar, reason):
    with pytest.raises(RequestError, match=reason) as refusal:
        read(grammars, grammar=grammar)
    assert refusal.value.param == "grammar"


def test_one_constraint_at_a_time(grammars):
    with pytest.raises(RequestError, match="only one"):
        read(grammars, json_schema="{}", grammar=DATE)
    assert read(grammars) is None


def test_a_worker_that_refused_a_grammar_goes_on(running):
    with pytest.raises(RequestError, match="response_format"):
        ask(running, but(FREE, json_schema='{"type": "strang"}'))
    assert ask(running, but(FREE, max_tokens=2, temperature=0.0)).finish_reason == "length"
