"""A request's way through each route: reserve, prefill, start, stream.

Each route is an async generator of :class:`Piece`; closing it, at whatever point, releases what the request holds on
both nodes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import NamedTuple

import msgspec
import structlog

from proxy.decode_node import Conversation, DecodeNode
from proxy.ledger import Account
from proxy.prefill_node import STREAM_SILENCE_S, Counts, FirstToken, PrefillNode
from proxy.router import unknown_to_vllm
from transfer.errors import CapacityError, CodecError, EngineError, IsthmusError, LinkError, ProtocolError
from transfer.messages import FinishReason, Reserve, Sampling, Ticket, TokenLogprob

RESERVE_S = 10.0
FULL_RETRY_S = 0.05
_REPLACEMENT = "\ufffd"

log = structlog.get_logger()


class Piece(NamedTuple):
    """Text of one choice for the client, and what was sampled; a choice's last piece has its ``finish_reason``.

    Text may lag behind tokens: ``token_ids`` and ``logprobs`` come as soon as they are known.
    """

    text: str
    finish_reason: FinishReason | None = None
    choice: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


Pieces = AsyncGenerator[Piece, None]


class Job(NamedTuple):
    """A request once its route is known. ``deadline_s`` bounds prefill and, after it, the wait for KV.

    ``choices`` answers are made. ``echo`` repeats the prompt, with log probabilities, in front of them (route ``gpu``).
    """

    request_id: str
    prompt: list[int]
    sampling: Sampling
    codec: str
    deadline_s: float
    choices: int = 1
    echo: bool = False


class KVLostError(Exception):
    """A split request whose KV never arrived, and which can go on elsewhere: ``error`` is why, ``rest`` what is left.

    ``sent_tokens`` tokens are with the client already; ``rest``'s prompt ends with them.
    """

    def __init__(self, error: IsthmusError, rest: Job, sent_tokens: int) -> None:
        super().__init__(str(error))
        self.error, self.rest, self.sent_tokens = error, rest, sent_tokens


async def split(job: Job, prefill: PrefillNode, decode: DecodeNode, account: Account) -> Pieces:
    """Prefill in vLLM, decode in llama.cpp.

    Raises :class:`KVLostError` if prefill succeeded and the KV did not arrive, where the client has seen no more than
    a first token that can be moved into the prompt.
    """
    async with _reserved(job, decode, account, kv=True) as (conversation, ticket):
        with account.meter.stage("prefill"):
            first = await conversation.guard(
                prefill.prefill(job.request_id, job.prompt, job.sampling, ticket, job.deadline_s)
            )
        account.cached_tokens = max(first.cached_tokens, ticket.reused_tokens)
        log.info("prefilled", request_id=job.request_id, ticket=ticket.ticket, cached_tokens=first.cached_tokens)
        keep = not _decoder_samples(job)
        if keep and (first.finish_reason == "stop" or job.sampling.max_tokens == 1):
            account.route_tokens = 1
            yield Piece(first.text, first.finish_reason, 0, (first.token,), first.logprobs)
            return
        if first.export_error:
            raise EngineError(f"the KV was not exported: {first.export_error}")
        sent = keep and _can_send(first, job.sampling)
        await conversation.start(first.token if keep else None, first_text_sent=sent)
        if sent:
            account.route_tokens = 1
            yield Piece(first.text, None, 0, (first.token,), first.logprobs)
        # The worker knows no log probabilities of a token that it did not sample.
        held = first.logprobs if keep and not sent else ()
        decoded = False
        try:
            async with aclosing(_decoded(conversation, account, job, job.deadline_s)) as pieces:
                async for piece in pieces:
                    decoded = True
                    yield piece._replace(logprobs=held + piece.logprobs)
                    held = ()
        except (LinkError, ProtocolError, CodecError) as error:
            rest = _rest(job, first.token) if sent else job
            if decoded or rest is None:
                raise
            raise KVLostError(error, rest, int(sent)) from None


async def cpu(job: Job, decode: DecodeNode, account: Account) -> Pieces:
    """Prefill and decode in llama.cpp."""
    async with _reserved(job, decode, account, kv=False) as (conversation, ticket):
        account.cached_tokens = ticket.reused_tokens
        await conversation.start(None, first_text_sent=False)
        async with aclosing(_decoded(conversation, account, job, STREAM_SILENCE_S)) as pieces:
            async for piece in pieces:
                yield piece


async def gpu(job: Job, prefill: PrefillNode, account: Account) -> Pieces:
    """Prefill and decode in vLLM."""
    stream = prefill.stream(job.request_id, job.prompt, job.sampling, choices=job.choices, echo=job.echo)
    async with aclosing(stream) as deltas:
        with account.meter.stage("prefill"):
            delta = await anext(deltas)
        while not isinstance(delta, Counts):
            account.route_tokens += len(delta.token_ids)
            yield Piece(*delta)
            with account.meter.stage("decode"):
                delta = await anext(deltas)
        account.route_tokens = delta.completion_tokens
        account.cached_tokens = delta.cached_tokens


@asynccontextmanager
async def _reserved(
    job: Job, decode: DecodeNode, account: Account, *, kv: bool
) -> AsyncIterator[tuple[Conversation, Ticket]]:
    """A conversation whose cells are promised; a full worker is asked again until ``job.deadline_s`` has passed."""
    deadline_ns = time.monotonic_ns() + int(job.deadline_s * 1e9)
    while True:
        async with decode.conversation(job.request_id, job.choices * (job.sampling.max_tokens + 1)) as conversation:
            with account.meter.stage("reserve"):
                ticket = await _ask(conversation, _reserve(job, kv=kv), deadline_ns)
            if ticket is not None:
                yield conversation, ticket
                return
        with account.meter.stage("reserve"):
            await asyncio.sleep(FULL_RETRY_S)


async def _ask(conversation: Conversation, reserve: Reserve, deadline_ns: int) -> Ticket | None:
    """The ticket, or None if the worker is full and there is time to ask again."""
    try:
        return await conversation.reserve(reserve, RESERVE_S)
    except CapacityError:
        if time.monotonic_ns() > deadline_ns:
            raise
        return None


async def _decoded(conversation: Conversation, account: Account, job: Job, first_wait_s: float) -> Pieces:
    """What the worker streams until all choices end; ``first_wait_s`` bounds the wait for KV or a local prefill."""
    wait_s = first_wait_s
    open_choices = job.choices
    while open_choices:
        tokens = await conversation.tokens(wait_s)
        wait_s = STREAM_SILENCE_S
        account.route_tokens += len(tokens.token_ids)
        if tokens.report:
            account.report = tokens.report
            account.route_tokens = tokens.report.completion_tokens
            account.cached_tokens = max(account.cached_tokens, tokens.report.kv_reused_tokens)
        open_choices -= tokens.finish_reason is not None
        yield Piece(tokens.text, tokens.finish_reason, tokens.choice, tuple(tokens.token_ids), tokens.logprobs)


def _reserve(job: Job, *, kv: bool) -> Reserve:
    return Reserve(
        request_id=job.request_id,
        prompt=job.prompt,
        sampling=job.sampling,
        source="kv" if kv else "local",
        codec=job.codec,
        deadline_ms=round(job.deadline_s * 1000),
        choices=job.choices,
    )


def _rest(job: Job, first_token: int) -> Job | None:
    """``job`` after its first token; None where the penalties that count only new tokens would lose one."""
    sampling = job.sampling
    if sampling.presence_penalty or sampling.frequency_penalty:
        return None
    shorter = msgspec.structs.replace(sampling, max_tokens=sampling.max_tokens - 1)
    return job._replace(prompt=[*job.prompt, first_token], sampling=shorter)


def _decoder_samples(job: Job) -> bool:
    """Whether vLLM's first token is of no use.

    A seeded draw cannot start in vLLM's random numbers and go on in llama.cpp's (greedy picking draws nothing), a
    grammar's state cannot change hands, some samplers are llama.cpp's own, and every choice draws for itself.
    """
    sampling = job.sampling
    seeded = sampling.seed is not None and sampling.temperature > 0
    constrained = bool(sampling.json_schema or sampling.grammar)
    return seeded or constrained or unknown_to_vllm(sampling) is not None or job.choices > 1


def _can_send(first: FirstToken, sampling: Sampling) -> bool:
    """Whether the first token's text is final: not empty, whole characters, and no stop string begins in it."""
    if not first.text or _REPLACEMENT in first.text:
        return False
    return not any(
        first.text.endswith(stop[:length])
        for stop in sampling.stop
        for length in range(1, min(len(stop), len(first.text)) + 1)
    )
