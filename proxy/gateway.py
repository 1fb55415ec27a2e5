"""What the proxy owns, and the part of a request's life that every route shares."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from typing import NamedTuple

import structlog

from proxy import costs, handoff, router
from proxy.api_keys import NOBODY, ApiKey
from proxy.breaker import Breaker
from proxy.costs import PrefillTime
from proxy.decode_node import DecodeNode
from proxy.handoff import PREFILL, Job, NodeFailedError, Piece, Pieces, Vllm
from proxy.ledger import Account, Entry, Ledger
from proxy.limits import Admission
from proxy.metrics import Metrics
from proxy.nodes import DecodePool
from proxy.openai import Body, ChatBody
from proxy.prefill_node import PrefillNode, PromptLogprobs
from proxy.registry import Registry
from proxy.render import Renderer
from proxy.router import Route
from proxy.transcript import Transcript
from transfer import keys
from transfer.config import Cluster, keys_folder

# A request is served by so many nodes, one after the other, if they fail it.
MAX_ATTEMPTS = 3

log = structlog.get_logger()


class Call(NamedTuple):
    """A parsed request: its body and what its headers ask for."""

    request_id: str
    body: Body
    forced_route: Route | None
    codec: str | None
    api_key: ApiKey = NOBODY


class Gateway:
    """Clients to all nodes, tokenizer, slots, ledger and metrics of one proxy."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.model = cluster.pair.name
        self.prefill = PrefillNode(
            f"http://{cluster.prefill.host}:{cluster.prefill.port}", self.model, cluster.proxy.max_running
        )
        self.prefill_breaker = Breaker()
        self.prefill_time = PrefillTime()
        folder = keys_folder(cluster)
        self._keys = keys.client(folder, "proxy") if folder else None
        self.workers = DecodePool(_pinned(cluster, self._keys), self._keys)
        self.renderer = Renderer(cluster.pair.hf_dir)
        self.admission = Admission(cluster.proxy.max_running, cluster.proxy.max_queued)
        self.ledger = Ledger(cluster.proxy.ledger_entries)
        self.metrics = Metrics(
            running=lambda: self.admission.running,
            queued=lambda: self.admission.queued,
            prefill_up=lambda: self.prefill.up,
            decode_up=lambda: self.workers.up,
            workers=lambda: self.workers,
        )

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Load the tokenizer and stay in touch with all nodes for the body."""
        await self.renderer.load()
        proxy = self.cluster.proxy
        clients = [asyncio.create_task(self.prefill.run()), asyncio.create_task(self.workers.run())]
        if proxy.registry_port:
            registry = Registry(proxy.host, proxy.registry_port, self._keys, self.workers.heard)
            clients.append(asyncio.create_task(registry.run()))
        try:
            yield
        finally:
            for client in clients:
                client.cancel()
                with suppress(asyncio.CancelledError):
                    await client
            self.renderer.close()

    async def pieces(self, call: Call, account: Account) -> Pieces:
        """The answer to ``call``, which has one prompt: wait for a slot, tokenize, route, hand off.

        Closing it gives everything back.
        """
        async with AsyncExitStack() as held:
            with account.meter.stage("queue"):
                slot = self.admission.slot(call.request_id, call.api_key, call.body.guessed_prompt_tokens)
                share = await held.enter_async_context(slot)
                held.callback(lambda: share.settle(account.prompt_tokens + account.completion_tokens))
            with account.meter.stage("tokenize"):
                prompt = await self._tokenize(call.body)
            with account.meter.stage("route"):
                job = self._plan(call, prompt, account)
            if call.body.prompt_logprobs is not None:
                scored = await self._scored(job, call.body.prompt_logprobs)
                for choice in range(job.choices):
                    yield Piece("", choice=choice, prompt_logprobs=scored)
            async with aclosing(self._served(call, job, account)) as pieces:
                async for piece in pieces:
                    yield piece

    def close(self, account: Account, status: str) -> Entry:
        """Enter a request that ended with ``status`` into the ledger and the metrics."""
        entry = account.close(status)
        self.ledger.add(entry)
        self.metrics.finished(entry)
        log.info(
            "request closed",
            request_id=entry.request_id,
            status=status,
            route=entry.route,
            worker=entry.worker,
            prompt_tokens=entry.prompt_tokens,
            completion_tokens=entry.completion_tokens,
            total_ns=entry.total_ns,
        )
        return entry

    async def _tokenize(self, body: Body) -> list[int]:
        self.renderer.require_known(body.logit_bias or (), "logit_bias")
        self.renderer.require_known(body.stop_token_ids or (), "stop_token_ids")
        if isinstance(body, ChatBody):
            tools = body.tool_use.for_template() if body.tool_use else []
            return await self.renderer.chat(body.turns(), tools, body.template_options())
        return await self.renderer.completion(body.prompt[0])

    def _plan(self, call: Call, prompt: list[int], account: Account) -> Job:
        account.prompt = prompt
        body = call.body
        barred = router.bar(body.sampling(self.cluster.prefill.max_model_len), echo=body.echoes_logprobs)
        route, reason = router.choose(
            call.forced_route,
            prefill_up=self.prefill.up,
            decode_up=self.workers.up,
            barred=barred,
            prefill_failing=self.prefill_breaker.failing(time.monotonic_ns()),
            decode_failing=self.workers.failing,
        )
        context = router.context_tokens(route, self.cluster)
        # vLLM counts every choice on its own; the worker's cells are there once.
        sharing = 1 if route == "gpu" else body.choices
        max_tokens = router.fit(len(prompt), body.token_limit, context, sharing)
        account.route, account.reason = route, reason
        account.alternative = costs.cpu_prefill(len(prompt), self.workers.any_status)
        return Job(
            call.request_id,
            prompt,
            body.sampling(max_tokens),
            call.codec,
            self.cluster.link.codec,
            self.cluster.link.transfer_deadline_s,
            body.choices,
            body.echoes_logprobs,
            forced=call.forced_route is not None,
            tenant="" if self.cluster.proxy.share_prefixes else call.api_key.tenant,
        )

    async def _scored(self, job: Job, num_top: int) -> PromptLogprobs:
        """What only vLLM gives, whichever route the answer takes: the log probabilities of the prompt's tokens."""
        return await self.prefill.prompt_logprobs(f"{job.request_id}-prompt", job.prompt, num_top, tenant=job.tenant)

    async def _served(self, call: Call, job: Job, account: Account) -> Pieces:
        """The answer to ``job``, by as many nodes as it takes; what nodes fail with is raised if no other may go on."""
        transcript = Transcript(job, self.renderer.vocabulary)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                async with aclosing(self._take(job, account)) as pieces:
                    async for piece in pieces:
                        yield transcript.take(piece)
                        if transcript.ended:
                            break
            except NodeFailedError as failed:
                job = self._go_on(call, job, transcript, failed, account, last=attempt == MAX_ATTEMPTS)
            else:
                self._succeeded(account)
                return
            if not transcript.left_tokens:
                yield transcript.end()
                return

    def _go_on(
        self, call: Call, job: Job, transcript: Transcript, failed: NodeFailedError, account: Account, *, last: bool
    ) -> Job:
        """What is left to do after ``failed``, with its route chosen; raises the error where nobody may do it."""
        self._blame(failed)
        rest = None if last else transcript.rest()
        if rest is None:
            raise failed.error
        avoid = job.avoid | {failed.node}
        barred = router.bar(rest.sampling, echo=rest.echo, prior_output=rest.prior_output)
        route = router.go_on(
            call.forced_route,
            prefill_up=self.prefill.up and PREFILL not in avoid,
            another_worker_up=self.workers.another(avoid),
            some_worker_up=self.workers.up,
            barred={route: "context" for route in router.ROUTES if not self._fits(rest, route)} | barred,
        )
        if route is None:
            raise failed.error
        log.warning("a node failed a request, going on", request_id=call.request_id, route=route, reason=str(failed))
        account.failed(failed.error.code, transcript.num_tokens)
        account.route, account.reason = route, "failed_over"
        # A node that failed may not have let go of the request yet.
        number = len(account.attempts)
        return rest._replace(request_id=f"{call.request_id}-{number}", avoid=avoid)

    def _fits(self, job: Job, route: Route) -> bool:
        sharing = 1 if route == "gpu" else job.choices
        return len(job.prompt) + sharing * job.sampling.max_tokens <= router.context_tokens(route, self.cluster)

    def _take(self, job: Job, account: Account) -> Pieces:
        match account.route:
            case "gpu":
                self.prefill_breaker.tried(time.monotonic_ns())
                return handoff.gpu(job, self.prefill, account)
            case "cpu":
                return handoff.cpu(job, self.workers, account)
            case _:
                self.prefill_breaker.tried(time.monotonic_ns())
                vllm = Vllm(self.prefill, self.prefill_time, self._blame)
                return handoff.split(job, vllm, self.workers, account)

    def _blame(self, failed: NodeFailedError) -> None:
        node = self.workers.nodes.get(failed.node)
        breaker = self.prefill_breaker if failed.node == PREFILL else node.breaker if node else None
        if breaker:
            breaker.failed(time.monotonic_ns())

    def _succeeded(self, account: Account) -> None:
        node = self.workers.nodes.get(account.worker or "")
        if node:
            node.breaker.succeeded()
        if account.route != "cpu":
            self.prefill_breaker.succeeded()


def _pinned(cluster: Cluster, own_keys: keys.ClientKeys | None) -> DecodeNode | None:
    """The worker that the cluster file names; none if it leaves the port to the system."""
    decode = cluster.decode
    if not decode.control_port:
        return None
    name = f"{decode.advertise_host}:{decode.control_port}"
    return DecodeNode(f"tcp://{decode.host}:{decode.control_port}", own_keys, name)
