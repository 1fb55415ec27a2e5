"""Answers that must match a schema: what reaches the engines, and what is refused."""

from __future__ import annotations

import json

import pytest

from proxy import constraints
from tests.proxy.test_failures import CPU, GPU, SPLIT, error_of
from transfer.messages import Reserve, Start

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
ASKED = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}


@pytest.mark.parametrize(
    ("fields", "schema"),
    [
        ({"response_format": ASKED}, SCHEMA),
        ({"response_format": {"type": "json_object"}}, {"type": "object"}),
        ({"structured_outputs": {"json": SCHEMA}}, SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, SCHEMA),
        ({"structured_outputs": {"json_object": True}}, {"type": "object"}),
        ({"guided_json": SCHEMA}, SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, SCHEMA),
        ({"json_schema": SCHEMA}, SCHEMA),
    ],
)
@pytest.mark.parametrize("endpoint", ["chat", "complete"])
def test_every_spelling_reaches_both_engines(stack, endpoint, fields, schema):
    post = getattr(stack, endpoint)
    assert post(SPLIT, **fields).status_code == post(GPU, **fields).status_code == 200
    reserve = stack.worker.heard(Reserve)[0]
    assert json.loads(reserve.sampling.json_schema) == schema
    prefilled, decoded = stack.prefill.bodies
    # A grammar's state cannot change hands, so the decoder samples from the first token on.
    assert prefilled["structured_outputs"] is None
    assert stack.worker.heard(Start)[0].first_token is None
    assert decoded["structured_outputs"] == {"json": schema}


@pytest.mark.parametrize(
    ("fields", "regex"),
    [
        ({"structured_outputs": {"regex": "[ab]+"}}, "[ab]+"),
        ({"structured_outputs": {"choice": ["a.b", "c (d)"]}}, r"a\.b|c \(d\)"),
        ({"guided_regex": r"\d{3}"}, r"\d{3}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
    ],
)
def test_expressions_and_choices_reach_both_engines(stack, fields, regex):
    assert stack.chat(SPLIT, **fields).status_code == stack.chat(GPU, **fields).status_code == 200
    assert stack.worker.heard(Reserve)[0].sampling.regex == regex
    assert stack.worker.heard(Start)[0].first_token is None
    prefilled, decoded = stack.prefill.bodies
    assert prefilled["structured_outputs"] is None
    assert decoded["structured_outputs"] == {"regex": regex}


@pytest.mark.parametrize("fields", [{"structured_outputs": {"grammar": "start: A"}}, {"guided_grammar": "start: A"}])
def test_grammars_are_the_decoders_by_every_name(stack, fields):
    assert stack.chat(SPLIT, **fields).status_code == 200
    assert stack.worker.heard(Reserve)[0].sampling.grammar == "start: A"
    assert error_of(stack.chat(GPU, **fields), 400)["param"] == "grammar"


def test_free_text(stack):
    assert stack.chat(SPLIT, response_format={"type": "text"}).status_code == 200
    assert stack.worker.heard(Reserve)[0].sampling.json_schema == ""
    assert stack.worker.heard(Start)[0].first_token == 42


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "yaml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "number of things"}}}),
        ("structured_outputs", {"structural_tag": "x"}),
        ("structured_outputs", {"choice": []}),
        ("structured_outputs", {"choice": ["a"], "regex": "a"}),
        ("guided_choice", [""]),
        ("guided_regex", ""),
        ("structured_outputs", {"json": "{"}),
        ("guided_json", "[1]"),
        ("guided_json", {"minimum": "one"}),
        ("json_schema", {"$ref": 5}),
        ("json_schema", {"title": "x" * constraints.MAX_SCHEMA_BYTES}),
    ],
)
def test_what_is_no_schema_is_named(stack, field, value):
    assert error_of(stack.chat(**{field: value}), 400)["param"] == field


def test_a_schema_that_nests_too_deeply(stack):
    for levels in (200, 2000, 5000):
        schema = '{"not":' * levels + "{}" + "}" * levels
        assert "nests too deeply" in error_of(stack.chat(guided_json=schema), 400)["message"]


def test_one_constraint_only(stack):
    error = error_of(stack.chat(response_format=ASKED, guided_json=SCHEMA), 400)
    assert "response_format and guided_json" in error["message"]
    assert error_of(stack.chat(json_schema=SCHEMA, grammar="root ::= [a]"), 400)["param"] == "json_schema"
    assert error_of(stack.chat(guided_regex="a", guided_choice=["a"]), 400)["param"] == "guided_regex"


@pytest.mark.parametrize(
    "fields",
    [
        {"grammar": 'root ::= "yes" | "no"'},
        {"typical_p": 0.5},
        {"xtc_probability": 0.5, "xtc_threshold": 0.2},
        {"dry_multiplier": 0.8, "dry_base": 2.0, "dry_allowed_length": 3, "dry_sequence_breakers": ["."]},
    ],
)
def test_what_only_llama_cpp_has_is_the_decoders(stack, fields):
    assert stack.chat(**fields).headers["x-isthmus-route"] == "split"
    sampling = stack.worker.heard(Reserve)[0].sampling
    for field, value in fields.items():
        assert getattr(sampling, field) == (tuple(value) if isinstance(value, list) else value)
        assert field not in stack.prefill.bodies[0]
    assert stack.worker.heard(Start)[0].first_token is None
    assert stack.chat(CPU, **fields).status_code == 200
    assert error_of(stack.chat(GPU, **fields), 400)["param"] == next(iter(fields))


def test_what_only_llama_cpp_has_needs_the_decode_node(hf_dir):
    from tests.proxy.conftest import make_cluster, running

    with running(make_cluster(hf_dir), decode_up=False) as stack:
        assert "typical_p" in error_of(stack.chat(typical_p=0.5), 503)["message"]
