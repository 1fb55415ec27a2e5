"""What the proxy owns, and the part of a request's life that every route shares."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from proxy import measured, tracing
from proxy.api_keys import NOBODY, ApiKey
from proxy.decode_node import DecodeNode
from proxy.dispatch import Dispatcher
from proxy.events import Events
from proxy.handoff import Job, Piece, Pieces
from proxy.ledger import Account, Entry, Ledger
from proxy.limits import Admission
from proxy.metrics import Metrics
from proxy.nodes import DecodePool
from proxy.openai import Body, ChatBody, CompletionBody
from proxy.parity import ParityGuard
from proxy.prefill_node import PrefillNode
from proxy.prefill_pool import PrefillPool
from proxy.registry import Registry
from proxy.regret import Regrets
from proxy.render import Renderer
from proxy.router import Objectives, Route
from proxy.shadow import Shadows
from proxy.store import Store, Wanted
from proxy.tracing import Tracing
from proxy.vllm_answers import PromptLogprobs
from proxy.witness import Witness
from transfer import keys
from transfer.config import Cluster, keys_folder

# The estimates of a proxy that is started again begin with so many of the newest entries.
RECALLED_ENTRIES = 256

log = structlog.get_logger()


class Call(NamedTuple):
    """A parsed request: its body and what its headers ask for."""

    request_id: str
    body: Body
    forced_route: Route | None
    codec: str | None
    api_key: ApiKey = NOBODY
    # W3C's headers, if there are any.
    trace_context: dict[str, str] = {}
    objectives: Objectives = Objectives()


class Gateway:
    """Clients to all nodes, tokenizer, slots, ledger and metrics of one proxy."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.model = cluster.pair.name
        self.prefill = PrefillPool(
            PrefillNode(name, self.model, cluster.proxy.max_running) for name in cluster.prefill.addresses
        )
        folder = keys_folder(cluster)
        self._keys = keys.client(folder, "proxy") if folder else None
        self.workers = DecodePool(_pinned(cluster, self._keys), self._keys)
        self.renderer = Renderer(cluster.pair.hf_dir)
        self.dispatcher = Dispatcher(cluster, self.prefill, self.workers, self.renderer)
        self.admission = Admission(cluster.proxy.max_running, cluster.proxy.max_queued)
        proxy = cluster.proxy
        self.store = Store(Path(proxy.ledger_file), proxy.ledger_rows) if proxy.ledger_file else None
        self.ledger = Ledger(proxy.ledger_entries, self.store)
        self.events = Events()
        self.tracing = Tracing(proxy.otlp_endpoint, self.model) if proxy.otlp_endpoint else None
        self.parity = ParityGuard(
            self.prefill,
            self.workers,
            proxy.parity_share,
            proxy.parity_max_kl,
            busy=lambda: self.admission.running + self.admission.queued > 0 or self.shadows.running,
            found=self._compared,
        )
        self.regrets = Regrets()
        self.shadows = Shadows(self.dispatcher, proxy.shadow_share, idle=self._is_idle, closed=self.close)
        self.metrics = Metrics(
            running=lambda: self.admission.running,
            queued=lambda: self.admission.queued,
            prefill_up=lambda: self.prefill.up,
            decode_up=lambda: self.workers.up,
            prefill_nodes=lambda: self.prefill,
            workers=lambda: self.workers,
            alarms=lambda: len(self.parity.alarms),
            unwritten=lambda: self.store.unwritten if self.store else 0,
        )

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Load the tokenizer and stay in touch with all nodes for the body."""
        await self.renderer.load()
        await asyncio.to_thread(self._recall)
        proxy = self.cluster.proxy
        clients = [
            asyncio.create_task(run)
            for run in (self.prefill.run(), self.workers.run(), self.parity.run(), self.shadows.run())
        ]
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
            for keeper in (self.store, self.tracing):
                if keeper:
                    await asyncio.to_thread(keeper.close)

    async def pieces(self, call: Call, account: Account) -> Pieces:
        """The answer to ``call``, which has one prompt: wait for a slot, tokenize, route, hand off.

        Closing it gives everything back.
        """
        self.shadows.interrupt()
        account.witness = Witness(self.parity.wants)
        if self.tracing:
            account.trace = tracing.describe(call.body, call.trace_context)
        async with AsyncExitStack() as held:
            with account.meter.stage("queue"):
                slot = self.admission.slot(call.request_id, call.api_key, call.body.guessed_prompt_tokens)
                share = await held.enter_async_context(slot)
                held.callback(lambda: share.settle(account.prompt_tokens + account.completion_tokens))
            with account.meter.stage("tokenize"), self.dispatcher.planner.arriving():
                prompt = await self._tokenize(call.body)
            with account.meter.stage("route"):
                job = self.dispatcher.plan(self._job(call, prompt), account)
            held.enter_context(self.dispatcher.planner.serving())
            if call.body.prompt_logprobs is not None:
                scored = await self._scored(job, call.body.prompt_logprobs)
                for choice in range(job.choices):
                    yield Piece("", choice=choice, prompt_logprobs=scored)
            async with aclosing(self.dispatcher.served(job, account)) as pieces:
                async for piece in pieces:
                    yield piece
            self.shadows.offer(job, account)
            self.parity.offer(job.prompt, job.tenant)

    def close(self, account: Account, status: str) -> Entry:
        """Enter a request that ended with ``status`` into the ledger and the metrics."""
        entry = self.ledger.add(account.close(status))
        self.dispatcher.planner.estimates.learn(entry)
        regret = self.regrets.learn(entry, account.prompt)
        if regret:
            self.ledger.amend(regret.seq, regret_ns=regret.ns)
            if regret.seq == entry.seq:
                entry = msgspec.structs.replace(entry, regret_ns=regret.ns)
            else:
                self.events.found(regret.seq, regret_ns=regret.ns)
            self.metrics.regretted(regret)
        self.metrics.finished(entry)
        self.events.closed_entry(entry)
        if account.witness.evidence:
            self.parity.keep(entry.seq, account.witness.evidence)
        if self.tracing and account.trace:
            self.tracing.record(entry, account.trace)
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

    def _recall(self) -> None:
        """What was measured, and what was learned before the proxy was started again."""
        if folder := self.cluster.proxy.measurements:
            self.dispatcher.planner.estimates.start(measured.read(Path(folder), self.cluster))
        for page in self.store.pages(Wanted(), RECALLED_ENTRIES) if self.store else ():
            self.dispatcher.planner.estimates.recall(page)

    def _is_idle(self) -> bool:
        """Whether no node does anything for this proxy."""
        waiting = self.admission.running + self.admission.queued
        return not waiting and not any(node.conversations for node in self.workers)

    def _compared(self, seq: int, codec: str, kl: float) -> None:
        self.ledger.amend(seq, parity_kl=kl)
        self.events.found(seq, parity_kl=kl)
        self.metrics.compared(codec, kl)

    async def _tokenize(self, body: Body) -> list[int]:
        self.renderer.require_known(body.logit_bias or (), "logit_bias")
        self.renderer.require_known(body.stop_token_ids or (), "stop_token_ids")
        if isinstance(body, ChatBody):
            tools = body.tool_use.for_template() if body.tool_use else []
            return await self.renderer.chat(body.turns(), tools, body.template_options())
        if body.suffix:
            return await self.renderer.between(body.prompt[0], body.suffix)
        return await self.renderer.completion(body.prompt[0])

    def _job(self, call: Call, prompt: list[int]) -> Job:
        body = call.body
        sampling = body.sampling(body.token_limit or self.cluster.prefill.max_model_len)
        if isinstance(body, CompletionBody) and body.suffix:
            ends = self.renderer.gap_ends
            sampling = msgspec.structs.replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *ends))
        return Job(
            call.request_id,
            prompt,
            sampling,
            call.codec,
            self.cluster.link.codec,
            self.dispatcher.deadline_ns(),
            body.choices,
            body.echoes_logprobs,
            forced=call.forced_route,
            tenant="" if self.cluster.proxy.share_prefixes else call.api_key.tenant,
            limit=body.token_limit,
            objectives=call.objectives,
        )

    async def _scored(self, job: Job, num_top: int) -> PromptLogprobs:
        """What only vLLM gives, whichever route the answer takes: the log probabilities of the prompt's tokens."""
        node = self.dispatcher.prefill_node(job)
        return await node.prompt_logprobs(f"{job.request_id}-prompt", job.prompt, num_top, tenant=job.tenant)


def _pinned(cluster: Cluster, own_keys: keys.ClientKeys | None) -> DecodeNode | None:
    """The worker that the cluster file names; none if it leaves the port to the system."""
    decode = cluster.decode
    if not decode.control_port:
        return None
    name = f"{decode.advertise_host}:{decode.control_port}"
    return DecodeNode(f"tcp://{decode.host}:{decode.control_port}", own_keys, name)
