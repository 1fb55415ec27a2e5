"""Asking a worker for one answer or several, computed by itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.cpu_decode.serving import Running
from transfer.messages import FinishReason, Sampling, Ticket, TokenLogprob
from transfer.stages import DecodeReport

PROMPT = [1, 504, 3575, 282, 4649, 314]  # "The capital of France is"
END = 2


@dataclass
class Answer:
    """What came for one choice."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None


def ask(running: Running, sampling: Sampling, prompt: list[int] = PROMPT, **more: object) -> Answer:
    """One answer."""
    return ask_for_choices(running, sampling, 1, prompt, **more)[0][0]


def ask_for_choices(
    running: Running, sampling: Sampling, choices: int, prompt: list[int] = PROMPT, **more: object
) -> tuple[list[Answer], DecodeReport]:
    """The answers in the order of their choices, and the report."""
    ticket = running.client.reserve(prompt, sampling, "local", choices=choices, **more)
    running.client.start(ticket)
    return gather(running, ticket, choices)


def gather(running: Running, ticket: Ticket, choices: int) -> tuple[list[Answer], DecodeReport]:
    """What comes for a started request, up to its report."""
    answers = [Answer() for _ in range(choices)]
    while True:
        message = running.client.next_tokens(ticket)
        answer = answers[message.choice]
        assert answer.finish_reason is None, "nothing comes for a choice that has ended"
        answer.ids += message.token_ids
        answer.text += message.text
        answer.logprobs += message.logprobs
        answer.finish_reason = message.finish_reason
        if message.report is not None:
            assert all(answer.finish_reason for answer in answers)
            return answers, message.report
