"""A request's way through each route: reserve, prefill, start, stream.

Each route is an async generator of :class:`Piece`; closing it, at whatever point, releases what the request holds on
both nodes.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import NamedTuple

import structlog

from proxy import costs
from proxy.decode_node import Conversation, DecodeNode
from proxy.ledger import Account
from proxy.load import Occupancy
from proxy.nodes import DecodePool
from proxy.planner import Planned
from proxy.predictions import computes_the_rest
from proxy.prefill_node import STREAM_SILENCE_S, PrefillNode
from proxy.router import Objectives, Route, unknown_to_vllm
from proxy.vllm_answers import Counts, FirstToken, PromptLogprobs
from transfer.errors import CapacityError, CodecError, EngineError, IsthmusError, LinkError, ProtocolError
from transfer.messages import FinishReason, Reserve, Sampling, Ticket, TokenLogprob

RESERVE_S = 10.0
# A reservation outlives vLLM's time, so that the worker can still compute what vLLM did not.
RESERVED_LONGER_S = 2.0
_REPLACEMENT = "\ufffd"

log = structlog.get_logger()


class Piece(NamedTuple):
    """Text of one choice for the client, and what was sampled; a choice's last piece has its ``finish_reason``.

    Text may lag behind tokens: ``token_ids`` and ``logprobs`` come as soon as they are known. ``prompt_logprobs``,
    where they are asked for, come before everything else.
    """

    text: str
    finish_reason: FinishReason | None = None
    choice: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None


Pieces = AsyncGenerator[Piece, None]


class Job(NamedTuple):
    """A request once it is known what is to be done.

    ``deadline_ns``, on the monotonic clock, bounds the wait for cells, the prefill and the wait for KV, together and in
    all attempts; only tokens for the client give a new one.

    ``codec`` is the one the client asks for, ``default_codec`` the one where it asks for none. ``choices`` answers are
    made. ``echo`` repeats the prompt, with log probabilities, in front of them (route ``gpu``). The last
    ``prior_output`` tokens of the prompt are output of nodes that failed; workers in ``avoid`` are among those. A
    ``forced`` route is kept. KV is shared with requests of the same ``tenant`` only, and with none without ``reuse``.
    The client allows each answer ``limit`` tokens, None: any number, and has ``objectives``. ``planned`` is where the
    router sends it.
    """

    request_id: str
    prompt: list[int]
    sampling: Sampling
    codec: str | None
    default_codec: str
    deadline_ns: int
    choices: int = 1
    echo: bool = False
    prior_output: int = 0
    avoid: frozenset[str] = frozenset()
    forced: Route | None = None
    tenant: str = ""
    reuse: bool = True
    limit: int | None = None
    objectives: Objectives = Objectives()
    planned: Planned | None = None

    @property
    def cells(self) -> int:
        """Cells that a worker needs for it."""
        return len(self.prompt) + self.choices * self.sampling.max_tokens

    @property
    def left_s(self) -> float:
        """Until its deadline; a little more than nothing after it."""
        return max(0.001, (self.deadline_ns - time.monotonic_ns()) / 1e9)

    @property
    def decoder_samples(self) -> bool:
        """Whether vLLM's first token is of no use.

        A seeded draw cannot start in vLLM's random numbers and go on in llama.cpp's (greedy picking draws nothing), a
        grammar's state cannot change hands, some samplers are llama.cpp's own, and every choice draws for itself.
        """
        sampling = self.sampling
        seeded = sampling.seed is not None and sampling.temperature > 0
        foreign = unknown_to_vllm(sampling, self.prior_output) is not None
        return seeded or sampling.constrained or self.choices > 1 or foreign


# In the place of a worker's name.
NO_WORKER = "decode"


class NodeFailedError(Exception):
    """``node``, a prefill node's or a worker's name, failed a request with ``error``; another one might serve it."""

    def __init__(self, node: str, error: IsthmusError) -> None:
        super().__init__(f"{node}: {error}")
        self.node, self.error = node, error


class WorkerFullError(Exception):
    """The worker ``node`` has no room for a request, or not soon enough; ``error`` is what it says."""

    def __init__(self, node: DecodeNode, error: CapacityError) -> None:
        super().__init__(f"{node.name}: {error}")
        self.node, self.error = node, error


class Vllm(NamedTuple):
    """A prefill node, and what all prefill nodes (``vllms``) and all ``workers`` are busy with.

    ``failed`` takes in that it failed a request which goes on, and ``another`` tells whether another prefill node could
    take the request then.
    """

    node: PrefillNode
    vllms: Occupancy
    workers: Occupancy
    failed: Callable[[NodeFailedError], None]
    another: Callable[[], bool]


async def split(job: Job, vllm: Vllm, workers: DecodePool, account: Account) -> Pieces:
    """Prefill in vLLM, decode in llama.cpp. Like all routes raises :class:`NodeFailedError` if a node fails it, and
    :class:`WorkerFullError` if its worker has no room.

    Unless the route is forced, the worker computes the prompt itself where its cells lack little of it, and where vLLM
    fails.
    """
    async with _reserved(job, workers, account, kv=True) as (conversation, ticket):
        if not job.forced and _computes_the_rest(job, ticket):
            account.turn_local("cached")
            first = None
        else:
            first = await _prefilled(job, vllm, conversation, ticket, account)
        if first is None:
            account.cached_tokens = ticket.reused_tokens
            await conversation.start_local()
            async with aclosing(_computed(conversation, vllm, account, job)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        account.cached_tokens = max(first.cached_tokens, ticket.reused_tokens)
        log.info("prefilled", request_id=job.request_id, ticket=ticket.ticket, cached_tokens=first.cached_tokens)
        keep = not job.decoder_samples
        if _is_all(first, job):
            account.route_tokens = 1
            yield Piece(first.text, first.finish_reason, 0, (first.token,), first.logprobs)
            return
        sent = keep and _can_send(first, job.sampling)
        account.witness.transplanted(job.prompt, first.token if keep else None)
        await conversation.start(first.token if keep else None, first_text_sent=sent)
        # The worker knows no log probabilities of a token that it did not sample.
        held = first.logprobs if keep and not sent else ()
        with _at_worker(conversation, vllm, account, job):
            if sent:
                account.route_tokens = 1
                yield Piece(first.text, None, 0, (first.token,), first.logprobs)
            decoded = _decoded(conversation, account, job, job.left_s, repeated=int(sent))
            async with aclosing(decoded) as pieces:
                async for piece in pieces:
                    yield piece._replace(logprobs=held + piece.logprobs)
                    held = ()


async def cpu(job: Job, vllm: Vllm, workers: DecodePool, account: Account) -> Pieces:
    """Prefill and decode in llama.cpp."""
    async with _reserved(job, workers, account, kv=False) as (conversation, ticket):
        account.cached_tokens = ticket.reused_tokens
        await conversation.start(None, first_text_sent=False)
        async with aclosing(_computed(conversation, vllm, account, job)) as pieces:
            async for piece in pieces:
                yield piece


async def gpu(job: Job, vllm: Vllm, account: Account) -> Pieces:
    """Prefill and decode in vLLM."""
    stream = vllm.node.stream(
        job.request_id, job.prompt, job.sampling, choices=job.choices, echo=job.echo, tenant=job.tenant
    )
    load, context_tokens = vllm.node.load, _context_tokens(job)
    with _blaming(vllm.node.name), load.holding(job.choices, context_tokens):
        async with aclosing(stream) as deltas:
            with account.meter.stage("prefill"), _prefilling(job, vllm, account, "gpu"):
                delta = await anext(deltas)
            with (
                load.occupancy.working(job.choices, context_tokens),
                vllm.vllms.working(),
                account.watched("decode", load.occupancy, vllm.workers),
            ):
                while not isinstance(delta, Counts):
                    account.route_tokens += len(delta.token_ids)
                    yield Piece(*delta)
                    with account.meter.stage("decode"):
                        delta = await anext(deltas)
            account.route_tokens = delta.completion_tokens
            account.cached_tokens = account.prefill_cached_tokens = delta.cached_tokens


async def _prefilled(
    job: Job, vllm: Vllm, conversation: Conversation, ticket: Ticket, account: Account
) -> FirstToken | None:
    """VLLM's first token, its KV on the way; None if it failed and the worker shall do it, which has what KV has come.

    If another prefill node is there, what comes next is decided by cost.
    """

    async def ask() -> FirstToken:
        with _blaming(vllm.node.name):
            first = await vllm.node.prefill(
                job.request_id, job.prompt, job.sampling, ticket, job.left_s, tenant=job.tenant
            )
            if first.export_error and not _is_all(first, job):
                raise EngineError(f"the KV was not exported: {first.export_error}")
            return first

    try:
        with account.meter.stage("prefill"), _prefilling(job, vllm, account, "split"):
            first = await conversation.guard(ask())
    except NodeFailedError as failed:
        in_time = job.deadline_ns > time.monotonic_ns()
        if failed.node != vllm.node.name or job.forced or (in_time and vllm.another()):
            raise
        vllm.failed(failed)
        account.turn_local("failed_over", failed.error.code)
        return None
    account.prefill_cached_tokens = first.cached_tokens
    return first


def _is_all(first: FirstToken, job: Job) -> bool:
    """Whether vLLM's first token ends the answer."""
    return not job.decoder_samples and (first.finish_reason == "stop" or job.sampling.max_tokens == 1)


@contextmanager
def _blaming(node: str) -> Iterator[None]:
    """Say that ``node`` is why the body fails, unless the request is at fault or somebody else is blamed already."""
    try:
        yield
    except (LinkError, ProtocolError, CodecError, EngineError) as error:
        raise NodeFailedError(node, error) from error


@contextmanager
def _prefilling(job: Job, vllm: Vllm, account: Account, route: Route) -> Iterator[None]:
    """The body is vLLM's prefill."""
    load = vllm.node.load
    work = load.backlog.begin(_expected_ns(job, route))
    try:
        own = load.occupancy
        with own.working(), vllm.vllms.working(), account.watched("prefill", own, vllm.workers):
            yield
            # While it is watched: a short prefill would be over before its own prompt counts.
            own.prefilled(len(job.prompt) - (job.planned.seen.vllm.cached_tokens if job.planned else 0))
    finally:
        load.backlog.end(work)
    load.prefixes.add(job.prompt, job.tenant)


@contextmanager
def _at_worker(conversation: Conversation, vllm: Vllm, account: Account, job: Job) -> Iterator[None]:
    """The worker decodes in the body."""
    own = conversation.occupancy
    working = own.working(job.choices, _context_tokens(job))
    with working, vllm.workers.working(), account.watched("decode", own, vllm.vllms):
        yield


def _expected_ns(job: Job, route: Route) -> int:
    """What the prefill alone was predicted to take, 0 if nothing was."""
    if job.planned is None:
        return 0
    decision, inputs = job.planned.decision, job.planned.seen
    if route == "cpu":
        worker = next((each for each in inputs.workers if each.name == decision.worker), None)
        new_tokens = len(job.prompt) - worker.held_tokens if worker else 0
        return worker.prefill.at(new_tokens, 1, new_tokens * worker.sequences) if worker and worker.prefill else 0
    prefill = inputs.vllm.prefill
    return prefill.at(len(job.prompt) - inputs.vllm.cached_tokens, 1) if prefill else 0


def _context_tokens(job: Job) -> int:
    """What decode steps are expected to look at, half of the answer made."""
    answer_tokens = job.planned.inputs.ask.answer_tokens if job.planned else job.sampling.max_tokens
    return len(job.prompt) + job.choices * answer_tokens // 2


def _computes_the_rest(job: Job, ticket: Ticket) -> bool:
    if job.planned is None:
        return False
    decision, inputs = job.planned.decision, job.planned.seen
    return computes_the_rest(inputs, decision.worker, decision.codec, ticket.reused_tokens)


@asynccontextmanager
async def _reserved(
    job: Job, workers: DecodePool, account: Account, *, kv: bool
) -> AsyncIterator[tuple[Conversation, Ticket]]:
    """A conversation with a worker that has promised cells; it is blamed for what fails in the body."""
    node, reserve = _placed(job, workers, account, kv=kv)
    max_tokens = job.choices * (job.sampling.max_tokens + 1)
    with _blaming(node.name):
        async with node.conversation(
            job.request_id, max_tokens, cells=job.cells, sequences=job.choices, context_tokens=_context_tokens(job)
        ) as conversation:
            with account.meter.stage("reserve"):
                try:
                    ticket = await conversation.reserve(reserve, RESERVE_S, _may_wait_s(job))
                except CapacityError as error:
                    node.refused_ns = time.monotonic_ns()
                    raise WorkerFullError(node, error) from error
            yield conversation, ticket


def _may_wait_s(job: Job) -> float:
    """How long waiting for cells is worth while."""
    patience_ns = job.planned.decision.patience_ns if job.planned else None
    return job.left_s if patience_ns is None or job.forced else min(job.left_s, patience_ns / 1e9)


def _placed(job: Job, workers: DecodePool, account: Account, *, kv: bool) -> tuple[DecodeNode, Reserve]:
    """The worker that was chosen for ``job``, and what it is asked for."""
    decision = job.planned.decision if job.planned else None
    node = workers.nodes.get((decision and decision.worker) or "")
    if node is None:
        raise NodeFailedError(NO_WORKER, LinkError("the decode node is down: it has just been forgotten"))
    codec = decision.codec if decision and kv else None
    account.worker, account.codec = node.name, codec
    account.alternative = costs.cpu_prefill(account.prompt_tokens, node.status)
    reserve = Reserve(
        request_id=job.request_id,
        prompt=job.prompt,
        sampling=account.witness.ask(job.sampling, node.name, codec),
        # What was kept of wrong KV would be as wrong.
        reuse=job.reuse and (bool(node.codecs) or not node.distrusted),
        source="kv" if kv else "local",
        codec=codec or "raw",
        deadline_ms=round((job.left_s + RESERVED_LONGER_S) * 1000),
        choices=job.choices,
        prior_output=job.prior_output,
        tenant=node.tenant(job.tenant),
    )
    return node, reserve


async def _computed(conversation: Conversation, vllm: Vllm, account: Account, job: Job) -> Pieces:
    """What the worker streams when it computes the prompt, or the rest of it, itself."""
    own = conversation.occupancy
    work = conversation.backlog.begin(_expected_ns(job, "cpu"))
    async with aclosing(_decoded(conversation, account, job, STREAM_SILENCE_S)) as pieces:
        try:
            with own.working(), vllm.workers.working(), account.watched("prefill", own, vllm.vllms):
                piece = await anext(pieces)
                own.prefilled(len(job.prompt) - account.cached_tokens)
        finally:
            conversation.backlog.end(work)
        with _at_worker(conversation, vllm, account, job):
            yield piece
            async for piece in pieces:
                yield piece


async def _decoded(
    conversation: Conversation, account: Account, job: Job, first_wait_s: float, *, repeated: int = 0
) -> Pieces:
    """What the worker streams until all choices end; ``first_wait_s`` bounds the wait for KV or a local prefill.

    It says the first token's id even if that is out already: the first ``repeated`` ids are left out.
    """
    wait_s = first_wait_s
    open_choices = job.choices
    while open_choices:
        tokens = await conversation.tokens(wait_s)
        wait_s = STREAM_SILENCE_S
        token_ids, repeated = tokens.token_ids[repeated:], max(0, repeated - len(tokens.token_ids))
        account.route_tokens += len(token_ids)
        if tokens.report:
            account.report = tokens.report
            account.route_tokens = tokens.report.completion_tokens
            account.cached_tokens = max(account.cached_tokens, tokens.report.kv_reused_tokens)
        open_choices -= tokens.finish_reason is not None
        logprobs = account.witness.take(tokens.logprobs)
        yield Piece(tokens.text, tokens.finish_reason, tokens.choice, tuple(token_ids), logprobs)


def _can_send(first: FirstToken, sampling: Sampling) -> bool:
    """Whether the first token's text is final: not empty, whole characters, and no stop string begins in it."""
    if not first.text or _REPLACEMENT in first.text:
        return False
    return not any(
        first.text.endswith(stop[:length])
        for stop in sampling.stop
        for length in range(1, min(len(stop), len(first.text)) + 1)
    )
