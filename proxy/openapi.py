"""The OpenAPI document behind ``/docs``: what FastAPI finds out by itself, and the bodies that we read ourselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from proxy.embeddings import EmbeddingBody
from proxy.openai import ChatBody, CompletionBody
from proxy.tokenization import DetokenizeBody, TokenizeBody

_REFERENCE = "#/components/schemas/{model}"
_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/embeddings": EmbeddingBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_STATUSES = {
    "400": "The request is wrong; `param` names the field",
    "401": "No valid API key",
    "404": "There is no such model",
    "413": "The body is too large",
    "429": "This key's minute, or its part of the queue, is used up; come back after `Retry-After` seconds",
    "500": "A defect",
    "502": "An engine failed",
    "503": "A node is down or all slots are taken; come back after `Retry-After` seconds",
}
_HEADERS = {
    "X-Isthmus-Route": "`split`, `gpu`, `cpu` or `auto`",
    "X-Isthmus-Codec": "How KV travels on route `split`",
    "X-SLO-TTFT-Ms": "The time to first token that the policy `max_goodput` is to keep, in milliseconds",
    "X-SLO-TPOT-Ms": "The same for the time per output token",
    "X-Request-Id": "Comes back with the answer, and names it in the ledger",
}


def install(app: FastAPI) -> None:
    """Make ``app`` describe its inference endpoints, its errors and its keys, too."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas["Error"] = _ERROR
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    found["security"] = [{"key": []}]
    for path, operations in found["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"] |= {status: _error(text) for status, text in _STATUSES.items()}
            if path == "/v1/embeddings":
                operation["responses"]["501"] = _error("No engine here makes embeddings")
    for path, body in _BODIES.items():
        schema = body.model_json_schema(ref_template=_REFERENCE)
        schemas |= schema.pop("$defs", {})
        schemas[body.__name__] = schema
        operation = found["paths"][path]["post"]
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model=body.__name__)}}},
        }
        if body not in (ChatBody, CompletionBody):
            continue
        operation["parameters"] = [
            {"name": name, "in": "header", "required": False, "description": text, "schema": {"type": "string"}}
            for name, text in _HEADERS.items()
        ]
        operation["responses"]["200"] = {
            "description": "The answer or, with `stream`, its chunks",
            "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
        }
    return found


def _error(text: str) -> dict[str, Any]:
    schema = {"$ref": _REFERENCE.format(model="Error")}
    return {"description": text, "content": {"application/json": {"schema": schema}}}
