"""What an answer may look like: the fields that constrain it, as one JSON schema, grammar or regular expression.

``response_format`` is OpenAI's, ``structured_outputs`` and ``guided_*``, its older spelling, are vLLM's,
``json_schema`` and ``grammar`` llama-server's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from pydantic import BaseModel, ConfigDict, Field

from transfer.errors import RequestError

MAX_SCHEMA_BYTES = 64 << 10
MAX_CHOICES = 1000
ANY_OBJECT = {"type": "object"}
# What means something in every dialect of regular expressions; other characters stand for themselves in all.
_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$]")

Schema = dict[str, Any]
Grammar = Annotated[str, Field(max_length=MAX_SCHEMA_BYTES)]
Regex = Annotated[str, Field(min_length=1, max_length=MAX_SCHEMA_BYTES)]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)]


class Constraint(NamedTuple):
    """What the whole answer must match: one of these, or none. ``json_schema`` is JSON, ``grammar`` GBNF or Lark."""

    json_schema: str = ""
    grammar: str = ""
    regex: str = ""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class NamedSchema(_Part):
    """OpenAI's wrapping of a JSON schema; name and description are for people."""

    schema_: Schema | None = Field(default=None, alias="schema")


class ResponseFormat(_Part):
    """``{"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}`` and its simpler forms."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(_Part):
    """vLLM's field, as far as the decode worker can do it."""

    json_: Schema | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: Regex | None = None
    choice: Choices | None = None
    grammar: Grammar | None = None
    structural_tag: str | None = None


def of_format(asked: ResponseFormat | None) -> Schema | None:
    """The schema that ``response_format`` asks for, None for free text."""
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return ANY_OBJECT
    if asked.json_schema is None or asked.json_schema.schema_ is None:
        raise RequestError('type "json_schema" needs json_schema.schema', "response_format")
    return asked.json_schema.schema_


def of_outputs(asked: StructuredOutputs | None) -> Constraint | None:
    """What ``structured_outputs`` asks for; :class:`RequestError` for several things, and for what only vLLM has."""
    param = "structured_outputs"
    if asked is None:
        return None
    if asked.structural_tag is not None:
        raise RequestError(f"{param}.structural_tag is not supported; use json, regex, choice or grammar", param)
    schema = ANY_OBJECT if asked.json_object else parsed(asked.json_, param)
    found = {
        "json": of_schema(schema, param),
        "regex": of_regex(asked.regex),
        "choice": of_choices(asked.choice),
        "grammar": of_grammar(asked.grammar),
    }
    return only({f"{param}.{name}": constraint for name, constraint in found.items()}, param)


def of_schema(schema: Schema | None, param: str) -> Constraint | None:
    """``schema``; :class:`RequestError` about ``param`` if it is no JSON schema or too large."""
    return None if schema is None else Constraint(json_schema=encoded(schema, param))


def of_grammar(grammar: str | None) -> Constraint | None:
    """A grammar, unless it is empty."""
    return Constraint(grammar=grammar) if grammar else None


def of_regex(regex: str | None) -> Constraint | None:
    """A regular expression for the whole answer."""
    return Constraint(regex=regex) if regex else None


def of_choices(choices: Sequence[str] | None) -> Constraint | None:
    """One of ``choices``, word for word."""
    if not choices:
        return None
    return Constraint(regex="|".join(_SPECIAL.sub(lambda found: "\\" + found[0], choice) for choice in choices))


def only(found: dict[str, Constraint | None], param: str | None = None) -> Constraint | None:
    """The one constraint among those found by field; :class:`RequestError` if there are several."""
    asked = {name: constraint for name, constraint in found.items() if constraint is not None}
    if len(asked) > 1:
        names = " and ".join(asked)
        raise RequestError(f"{names} cannot be combined; keep one of them", param or next(iter(asked)))
    return next(iter(asked.values()), None)


def parsed(schema: Schema | str | None, param: str) -> Schema | None:
    """A schema that may come as text of JSON; :class:`RequestError` about ``param`` if it is none."""
    if not isinstance(schema, str):
        return schema
    try:
        value = json.loads(schema)
    except (ValueError, RecursionError) as error:
        what = "it nests too deeply" if isinstance(error, RecursionError) else error
        raise RequestError(f"{param} is not JSON: {what}", param) from None
    if not isinstance(value, dict):
        raise RequestError(f"{param} is not a JSON schema: it must be an object", param)
    return value


def encoded(schema: Schema, param: str) -> str:
    """``schema`` as JSON; :class:`RequestError` about ``param`` if it is no JSON schema or too large."""
    try:
        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA_BYTES:
            raise RequestError(f"{param}: the JSON schema is over {MAX_SCHEMA_BYTES} bytes", param)
        Draft202012Validator.check_schema(schema)
    except (SchemaError, RecursionError) as error:
        what = error.message if isinstance(error, SchemaError) else "it nests too deeply"
        raise RequestError(f"{param} is not a JSON schema: {what}", param) from None
    return text
