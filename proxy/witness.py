"""What a split request shows of the KV that it was served from: evidence for the parity guard (``parity.py``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from transfer.messages import Sampling, TokenLogprob

# As many as workers tell (OpenAI's limit).
TOP = 20


class Evidence(NamedTuple):
    """The likeliest tokens that ``worker`` saw after ``tokens``, whose KV had come by ``codec``, with natural logs."""

    worker: str
    codec: str
    tokens: list[int]
    top: tuple[tuple[int, float], ...]


class Witness:
    """Stands beside one request, asks the worker for log probabilities where they are wanted, and hides them again.

    ``wants`` says whether those of a worker and a codec are; it is asked once for each.
    """

    def __init__(self, wants: Callable[[str, str], bool] | None = None) -> None:
        self.evidence: Evidence | None = None
        self._wants = wants or (lambda _worker, _codec: False)
        self._way: tuple[str, str | None] = ("", None)
        self._looking = False
        self._num_top: int | None = None
        self._transplanted: tuple[list[int], int | None] | None = None

    def ask(self, sampling: Sampling, worker: str, codec: str | None) -> Sampling:
        """What to ask ``worker`` for; without a ``codec`` no KV will come."""
        if self._way != (worker, codec):
            self._way = worker, codec
            self._looking = codec is not None and self._wants(worker, codec)
        self._num_top, self._transplanted = sampling.logprobs, None
        return msgspec.structs.replace(sampling, logprobs=TOP) if self._looking else sampling

    def transplanted(self, prompt: list[int], first_token: int | None) -> None:
        """The worker goes on after ``prompt``, whose KV comes by the wire, and ``first_token``, if it is given."""
        self._transplanted = prompt, first_token

    def take(self, logprobs: Sequence[TokenLogprob]) -> tuple[TokenLogprob, ...]:
        """Look at what the worker says of its next tokens; returns what the client asked for of it."""
        if not self._looking:
            return tuple(logprobs)
        worker, codec = self._way
        if logprobs and self._transplanted and codec:
            prompt, first_token = self._transplanted
            tokens = prompt if first_token is None else [*prompt, first_token]
            self.evidence = self.evidence or Evidence(worker, codec, tokens, logprobs[0].top)
            self._transplanted = None
        if self._num_top is None:
            return ()
        return tuple(TokenLogprob(each.token, each.logprob, each.top[: self._num_top]) for each in logprobs)
