"""The one error tree.

::

    IsthmusError
    ├── ConfigError        the cluster file or a flag is wrong          CLI exit 2
    │   └── UnsplittableError  a model's KV stays in its engine
    ├── RequestError       what the client asked for cannot be served   HTTP 400
    ├── LinkError          a peer is unreachable, silent or too late    HTTP 503
    ├── ProtocolError      a peer broke the wire format                 transfer fails
    ├── GeometryError      two nodes disagree about the model           handshake refused
    ├── CodecError         a payload cannot be encoded or decoded       transfer fails
    ├── CapacityError      no cells, slots or bytes left                HTTP 503
    └── EngineError        vLLM or llama.cpp failed                     HTTP 502

``code`` is the name that travels in messages and in HTTP error bodies; an error without one of its own travels as its
parent.
"""

from __future__ import annotations


class IsthmusError(Exception):
    """Base of every error that Isthmus raises on purpose."""

    code = "internal_error"


class ConfigError(IsthmusError):
    """The cluster file or a flag is wrong; the message names the key and the fix."""

    code = "config_error"


class UnsplittableError(ConfigError):
    """KV of this model cannot go from one engine to the other, for ``reason``; the message says what can be done."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; [prefill] export = false serves it by routes gpu and cpu")
        self.reason = reason


class RequestError(IsthmusError):
    """The request itself cannot be served; ``param`` names the offending field."""

    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class LinkError(IsthmusError):
    """A peer is unreachable, silent or past its deadline."""

    code = "link_error"


class ProtocolError(IsthmusError):
    """A message or frame that breaks the wire format, its limits or its checksums."""

    code = "protocol_error"


class GeometryError(IsthmusError):
    """Two nodes disagree about the model; names the field and both values."""

    code = "geometry_mismatch"

    def __init__(self, field: str, ours: object, theirs: object) -> None:
        super().__init__(f"model geometry differs in {field}: {ours!r} here, {theirs!r} there")
        self.field = field


class CodecError(IsthmusError):
    """KV values that a codec cannot carry, or a payload it cannot have produced."""

    code = "codec_error"


class CapacityError(IsthmusError):
    """No cells, sequences or bytes left for this request."""

    code = "capacity_exceeded"


class EngineError(IsthmusError):
    """vLLM or llama.cpp failed; the message carries what the engine said."""

    code = "engine_error"


def from_wire(code: str, message: str, param: str | None = None) -> IsthmusError:
    """Rebuild the error that a peer reported as ``code`` and ``message``, about the request's field ``param``."""
    if code == RequestError.code:
        return RequestError(message, param)
    for kind in (ConfigError, LinkError, ProtocolError, CodecError, CapacityError, EngineError):
        if kind.code == code:
            return kind(message)
    return EngineError(f"{code}: {message}")
