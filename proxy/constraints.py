"""What an answer may look like: the fields that constrain it, as one JSON schema.

``response_format`` is OpenAI's, ``guided_json`` and ``structured_outputs`` are vLLM's, ``json_schema`` and ``grammar``
llama-server's.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from pydantic import BaseModel, ConfigDict, Field

from transfer.errors import RequestError

MAX_SCHEMA_BYTES = 64 << 10
ANY_OBJECT = {"type": "object"}

Schema = dict[str, Any]


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
    """vLLM's field, as far as both engines can do it."""

    json_: Schema | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
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


def of_outputs(asked: StructuredOutputs | None) -> Schema | None:
    """The schema that ``structured_outputs`` asks for; :class:`RequestError` for what only vLLM has."""
    if asked is None:
        return None
    for field in ("regex", "choice", "grammar", "structural_tag"):
        if getattr(asked, field) is not None:
            raise RequestError(f"structured_outputs.{field} is not supported; use json", "structured_outputs")
    return ANY_OBJECT if asked.json_object else parsed(asked.json_, "structured_outputs")


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
