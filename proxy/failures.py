"""Errors as OpenAI clients expect them: one table from error class to HTTP status and type."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, NamedTuple

from transfer.errors import (
    CapacityError,
    CodecError,
    ConfigError,
    EngineError,
    GeometryError,
    IsthmusError,
    LinkError,
    ProtocolError,
    RequestError,
)

RETRY_AFTER_S = 1


class UnknownModelError(RequestError):
    """The ``model`` of the request is not the one that this cluster serves."""

    code = "model_not_found"


class UnknownEntryError(RequestError):
    """The ledger knows no such request."""

    code = "entry_not_found"


class ContextLengthError(RequestError):
    """Prompt and ``max_tokens`` together do not fit the context of the route."""

    code = "context_length_exceeded"


class BodySizeError(RequestError):
    """The request body is larger than the proxy reads."""

    code = "request_too_large"


class NotServedError(RequestError):
    """An endpoint of OpenAI's that this cluster has no engine for."""

    code = "not_implemented"


class AuthenticationError(IsthmusError):
    """The client presents no API key, or one that is not ours."""

    code = "invalid_api_key"


class RateLimitError(IsthmusError):
    """An API key's minute is used up; the next one begins in ``retry_after_s``."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Row(NamedTuple):
    """What the client is told about one class of error."""

    status: HTTPStatus
    type: str


TABLE: dict[type[Exception], Row] = {
    UnknownModelError: Row(HTTPStatus.NOT_FOUND, "invalid_request_error"),
    UnknownEntryError: Row(HTTPStatus.NOT_FOUND, "invalid_request_error"),
    AuthenticationError: Row(HTTPStatus.UNAUTHORIZED, "authentication_error"),
    RateLimitError: Row(HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_error"),
    NotServedError: Row(HTTPStatus.NOT_IMPLEMENTED, "invalid_request_error"),
    BodySizeError: Row(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "invalid_request_error"),
    RequestError: Row(HTTPStatus.BAD_REQUEST, "invalid_request_error"),
    CapacityError: Row(HTTPStatus.SERVICE_UNAVAILABLE, "server_error"),
    LinkError: Row(HTTPStatus.SERVICE_UNAVAILABLE, "server_error"),
    ProtocolError: Row(HTTPStatus.BAD_GATEWAY, "server_error"),
    GeometryError: Row(HTTPStatus.BAD_GATEWAY, "server_error"),
    CodecError: Row(HTTPStatus.BAD_GATEWAY, "server_error"),
    EngineError: Row(HTTPStatus.BAD_GATEWAY, "server_error"),
    ConfigError: Row(HTTPStatus.INTERNAL_SERVER_ERROR, "server_error"),
    Exception: Row(HTTPStatus.INTERNAL_SERVER_ERROR, "server_error"),
}


class Failed(NamedTuple):
    """One error, ready to be sent: HTTP status, ``{"error": {...}}``, extra headers, and its code for the ledger."""

    status: HTTPStatus
    body: dict[str, Any]
    headers: dict[str, str]
    code: str


def describe(error: Exception) -> Failed:
    """Look ``error`` up by its nearest base class. The text of an unplanned error stays in the log."""
    row = next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)
    planned = row is not TABLE[Exception]
    code = getattr(error, "code", "internal_error") if planned else "internal_error"
    message = str(error) if planned else "internal error; the proxy's log has the details"
    body = error_body(message, row.type, getattr(error, "param", None), code)
    return Failed(row.status, body, _headers(error, row.status), code)


def _headers(error: Exception, status: HTTPStatus) -> dict[str, str]:
    match status:
        case HTTPStatus.UNAUTHORIZED:
            return {"WWW-Authenticate": "Bearer"}
        case HTTPStatus.TOO_MANY_REQUESTS | HTTPStatus.SERVICE_UNAVAILABLE:
            return {"Retry-After": str(getattr(error, "retry_after_s", RETRY_AFTER_S))}
        case _:
            return {}


def error_body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
