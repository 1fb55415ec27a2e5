"""From a batch's rows to what is said of a sequence: tokens, text, and why it ends."""

from __future__ import annotations

from typing import NamedTuple

from cpu_decode.llama import Context, Model
from cpu_decode.sequence import Sequence
from transfer.messages import FinishReason, Tokens
from transfer.stages import DecodeReport


class Answer(NamedTuple):
    """What a step gave a sequence: its new tokens, the text that is to be sent, and why it ends if it does."""

    tokens: list[int]
    text: str
    finish_reason: FinishReason | None


def sample(sequence: Sequence, context: Context, row: int, draft: list[int]) -> Answer:
    """Sample from batch row ``row``, and from each row behind it as long as the guesses of ``draft`` came.

    Raises :class:`RequestError` if the request's constraints leave no token.
    """
    came: list[int] = []
    said, finish_reason = "", None
    sequence.drafted_tokens += len(draft)
    for guess in [*draft, None]:
        token, logprob = sequence.sampler.sample(context, row + len(came))
        came.append(token)
        sequence.tokens.append(token)
        if logprob is not None:
            sequence.unsent_logprobs.append(logprob)
        if token == guess:
            sequence.num_cached += 1
            sequence.accepted_tokens += 1
        text, finish_reason = take(sequence, context.model, token)
        said += text
        if token != guess or finish_reason:
            break
    return Answer(came, said, finish_reason)


def take(sequence: Sequence, model: Model, token: int) -> tuple[str, FinishReason | None]:
    """Turn a new token into text that is to be sent, and say whether the choice ends with it."""
    text, finish_reason = sequence.take(token, model)
    return "" if sequence.first_text_sent and sequence.completion_tokens == 1 else text, finish_reason


def message(sequence: Sequence, text: str, finish_reason: FinishReason | None, report: DecodeReport | None) -> Tokens:
    """What has not been sent yet of ``sequence``; its tokens and log probabilities count as sent then."""
    ids, sequence.unsent_ids = sequence.unsent_ids, []
    logprobs, sequence.unsent_logprobs = sequence.unsent_logprobs, []
    return Tokens(
        request_id=sequence.request_id,
        token_ids=ids,
        text=text,
        finish_reason=finish_reason,
        report=report,
        choice=sequence.choice,
        logprobs=tuple(logprobs),
    )
