"""OpenAI's request schemas, as far as this proxy serves them, and what it says about the rest.

Fields that OpenAI has and we do not know are ignored, as OpenAI ignores them; fields whose effect we lack are refused
by name. ``top_k``, ``min_p``, ``repetition_penalty`` and ``ignore_eos`` are vLLM's; ``isthmus`` asks for the ledger.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from proxy.failures import UnknownModelError
from transfer.errors import RequestError
from transfer.messages import Sampling

MAX_STOPS = 16
COMPLETION_MAX_TOKENS = 16
_INT64 = 2**63


def _join_parts(value: object) -> object:
    """A list of text parts as one string; strings pass."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('only parts of the form {"type": "text", "text": "..."} are supported')
        texts.append(part["text"])
    return "".join(texts)


def _as_stops(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _one_prompt(value: object) -> str | list[int]:
    """The prompt out of OpenAI's four forms: text, ids, or a list with one of those."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(type(token) is int for token in value):
            return value
        if len(value) > 1 and all(isinstance(prompt, str | list) for prompt in value):
            raise ValueError("one prompt a request is supported; send one request for each")
        if len(value) == 1 and isinstance(value[0], str | list):
            return _one_prompt(value[0])
    raise ValueError("must be a string, a list of token ids, or a list with one of those, and not empty")


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(_Schema):
    """What else a stream carries."""

    include_usage: bool | None = False


class ChatMessage(_Schema):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_parts)]


class _Body(_Schema):
    """What both endpoints take. ``null`` means the default, as with OpenAI."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stop: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS), BeforeValidator(_as_stops)]
        | None
    ) = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    logit_bias: (
        Annotated[dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
        | None
    ) = None
    ignore_eos: bool | None = None
    isthmus: bool | None = None

    n: int | None = None
    best_of: int | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    echo: bool | None = None
    suffix: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate; None for what the context leaves."""
        return self.max_tokens

    def sampling(self, max_tokens: int) -> Sampling:
        """How both engines shall pick tokens."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=max(0, _or(self.top_k, 0)),
            min_p=_or(self.min_p, 0.0),
            seed=self.seed,
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            logit_bias=self.logit_bias or {},
            stop=tuple(self.stop or ()),
            ignore_eos=bool(self.ignore_eos),
        )

    def refuse_unsupported(self) -> None:
        """Raise :class:`RequestError` naming the first field whose effect we lack."""
        asked = {
            "n": _or(self.n, 1) != 1,
            "best_of": _or(self.best_of, 1) != 1,
            "logprobs": self.logprobs is not None and self.logprobs is not False,
            "top_logprobs": bool(self.top_logprobs),
            "tools": bool(self.tools),
            "functions": bool(self.functions),
            "response_format": (self.response_format or {}).get("type", "text") != "text",
            "echo": bool(self.echo),
            "suffix": bool(self.suffix),
        }
        for field, used in asked.items():
            if used:
                raise RequestError(f"{field} = {getattr(self, field)!r} is not supported yet; leave it out", field)


class ChatBody(_Body):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def token_limit(self) -> int | None:
        """``max_completion_tokens`` under its new name or its old one."""
        return self.max_completion_tokens or self.max_tokens

    def turns(self) -> list[dict[str, str]]:
        """The messages as chat templates know them; ``developer`` is OpenAI's newer name for ``system``."""
        return [
            {"role": "system" if turn.role == "developer" else turn.role, "content": turn.content}
            for turn in self.messages
        ]


class CompletionBody(_Body):
    """``POST /v1/completions``."""

    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt)]

    @property
    def token_limit(self) -> int | None:
        """OpenAI's default for this endpoint is 16."""
        return self.max_tokens or COMPLETION_MAX_TOKENS


Body = ChatBody | CompletionBody
B = TypeVar("B", ChatBody, CompletionBody)
V = TypeVar("V")


def parse(kind: type[B], data: bytes, model: str) -> B:
    """Read a request body for ``model``, the one that is served.

    Raises :class:`RequestError` naming the field that is wrong, and :class:`UnknownModelError`.
    """
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        raise _first_error(error) from None
    if body.model != model:
        raise UnknownModelError(f"the model {body.model!r} does not exist; this cluster serves {model!r}", "model")
    body.refuse_unsupported()
    return body


def _first_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return RequestError(f"the request body is not JSON: {first['msg']}")
    if not first["loc"]:
        return RequestError(f"the request body is not a JSON object: {first['msg']}")
    where = ".".join(str(part) for part in first["loc"])
    return RequestError(f"{where}: {first['msg']}", str(first["loc"][0]))


def _or(value: V | None, default: V) -> V:
    return default if value is None else value
