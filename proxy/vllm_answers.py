"""What vLLM's server says, parsed: completions, pieces of streams, refusals (fields: see ``prefill_node.py``)."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any, NamedTuple

import msgspec

from transfer.errors import EngineError, RequestError
from transfer.messages import FinishReason, Sampling, TokenLogprob

_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}

# As vLLM says them: for each token of a prompt but the first the likeliest ones in its place, by their ids.
PromptLogprobs = list[dict[str, Any] | None]


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None

    @property
    def cached_tokens(self) -> int:
        return (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0


class _Logprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class Choice(msgspec.Struct):
    """What an answer says of one of its choices."""

    text: str
    index: int = 0
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None


class _Error(msgspec.Struct):
    message: str
    code: int | str | None = None


class _Export(msgspec.Struct):
    exported_tokens: int = 0
    complete: bool = False
    error: str | None = None


class _TransferParams(msgspec.Struct):
    isthmus: _Export | None = None


class Completion(msgspec.Struct):
    """An answer, or one piece of a stream."""

    choices: list[Choice] = []
    usage: _Usage | None = None
    kv_transfer_params: _TransferParams | None = None
    error: _Error | None = None


class FirstToken(NamedTuple):
    """What vLLM sampled after a prefill, and what became of the KV: ``export_error`` is None if all of it was sent."""

    token: int
    text: str
    finish_reason: FinishReason
    cached_tokens: int
    export_error: str | None
    logprobs: tuple[TokenLogprob, ...] = ()


class Delta(NamedTuple):
    """A piece of one choice of a streamed answer; the choice's last one has its ``finish_reason``."""

    text: str
    finish_reason: FinishReason | None = None
    choice: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


class Counts(NamedTuple):
    """The end of a streamed answer: what all choices took."""

    completion_tokens: int
    cached_tokens: int


def parse(data: bytes | bytearray) -> Completion:
    """Raises :class:`EngineError` for what is no answer, and what an error in it says (:func:`refusal`)."""
    try:
        completion = msgspec.json.decode(data, type=Completion)
    except msgspec.DecodeError as error:
        raise EngineError(f"vLLM's answer does not parse: {error}") from None
    if completion.error:
        raise _failure(completion.error.code, completion.error.message)
    return completion


def refusal(status: int, data: bytes) -> EngineError | RequestError:
    """What an answer with an HTTP ``status`` other than 200 means."""
    try:
        error = msgspec.json.decode(data, type=Completion).error
    except msgspec.DecodeError:
        error = None
    return _failure(status, error.message if error else f"HTTP status {status}")


def _failure(code: int | str | None, message: str) -> EngineError | RequestError:
    """VLLM numbers errors as HTTP does, inside a stream too."""
    if code == HTTPStatus.BAD_REQUEST:
        return RequestError(f"vLLM refuses the request: {message}")
    return EngineError(f"vLLM failed: {message}")


def first_token(completion: Completion, sampling: Sampling) -> FirstToken:
    """The outcome of a prefill; :class:`EngineError` if there is no token in it."""
    if not completion.choices or not completion.choices[0].token_ids:
        raise EngineError("vLLM answered without a token id; it must understand return_token_ids")
    choice = completion.choices[0]
    return FirstToken(
        token=completion.choices[0].token_ids[0],
        text=choice.text,
        finish_reason=_finish_reason(choice.finish_reason or ""),
        cached_tokens=completion.usage.cached_tokens if completion.usage else 0,
        export_error=_export_error(completion.kv_transfer_params),
        logprobs=_token_logprobs(choice.logprobs, sampling.logprobs),
    )


def delta(choice: Choice, sampling: Sampling) -> Delta:
    """One choice's part of a piece of a stream; :class:`EngineError` if it ends for no reason that we know."""
    reason = _finish_reason(choice.finish_reason) if choice.finish_reason else None
    logprobs = _token_logprobs(choice.logprobs, sampling.logprobs)
    return Delta(choice.text, reason, choice.index, tuple(choice.token_ids or ()), logprobs)


def _token_logprobs(found: _Logprobs | None, num_top: int | None) -> tuple[TokenLogprob, ...]:
    """What vLLM says, likeliest first and at most ``num_top``; NaN for a prompt's first token, which has none."""
    if found is None:
        return ()
    answer = []
    for name, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        ranked = sorted(((_token_id(name), value) for name, value in (top or {}).items()), key=lambda pair: -pair[1])
        own = math.nan if logprob is None else logprob
        answer.append(TokenLogprob(_token_id(name), own, tuple(ranked[:num_top])))
    return tuple(answer)


def _token_id(name: str) -> int:
    """``token_id:42``, as vLLM writes tokens under ``return_tokens_as_token_ids``."""
    number = name.removeprefix("token_id:")
    if not number.isdecimal():
        raise EngineError(f"vLLM names a token {name!r}; it must understand return_tokens_as_token_ids")
    return int(number)


def _finish_reason(reason: str) -> FinishReason:
    if reason not in _FINISH_REASONS:
        raise EngineError(f"vLLM ended the request with {reason!r}")
    return _FINISH_REASONS[reason]


def _export_error(params: _TransferParams | None) -> str | None:
    export = params.isthmus if params else None
    if export is None:
        return "vLLM's answer says nothing about the KV; is it running with our connector?"
    if export.error:
        return export.error
    return None if export.complete else f"only {export.exported_tokens} tokens of KV were exported"
