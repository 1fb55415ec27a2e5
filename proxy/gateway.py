"""What the proxy owns, and the part of a request's life that every route shares."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from typing import NamedTuple

import structlog

from proxy import costs, handoff, router
from proxy.decode_node import DecodeNode
from proxy.handoff import Job, Pieces
from proxy.ledger import Account, Entry, Ledger
from proxy.limits import Admission
from proxy.metrics import Metrics
from proxy.openai import Body, ChatBody
from proxy.prefill_node import PrefillNode
from proxy.render import Renderer
from proxy.router import Route
from transfer import keys
from transfer.config import Cluster, keys_folder

log = structlog.get_logger()


class Call(NamedTuple):
    """A parsed request: its body and what its headers ask for."""

    request_id: str
    body: Body
    forced_route: Route | None
    codec: str | None


class Gateway:
    """Clients to both nodes, tokenizer, slots, ledger and metrics of one proxy."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.model = cluster.pair.name
        self.prefill = PrefillNode(
            f"http://{cluster.prefill.host}:{cluster.prefill.port}", self.model, cluster.proxy.max_running
        )
        folder = keys_folder(cluster)
        self.decode = DecodeNode(
            f"tcp://{cluster.decode.host}:{cluster.decode.control_port}",
            keys.client(folder, "proxy") if folder else None,
        )
        self.renderer = Renderer(cluster.pair.hf_dir)
        self.admission = Admission(cluster.proxy.max_running, cluster.proxy.max_queued)
        self.ledger = Ledger(cluster.proxy.ledger_entries)
        self.metrics = Metrics(
            running=lambda: self.admission.running,
            queued=lambda: self.admission.queued,
            prefill_up=lambda: self.prefill.up,
            decode_up=lambda: self.decode.up,
        )

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Load the tokenizer and stay in touch with both nodes for the body."""
        await self.renderer.load()
        clients = [asyncio.create_task(self.prefill.run()), asyncio.create_task(self.decode.run())]
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
                await held.enter_async_context(self.admission.slot(call.request_id))
            with account.meter.stage("tokenize"):
                prompt = await self._tokenize(call.body)
            with account.meter.stage("route"):
                job = self._plan(call, prompt, account)
            try:
                async with aclosing(self._take(job, account)) as pieces:
                    async for piece in pieces:
                        yield piece
            except handoff.KVLostError as lost:
                rest = self._fail_over(call, lost, account)
                async with aclosing(self._take(rest, account)) as pieces:
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
            prompt_tokens=entry.prompt_tokens,
            completion_tokens=entry.completion_tokens,
            total_ns=entry.total_ns,
        )
        return entry

    async def _tokenize(self, body: Body) -> list[int]:
        self.renderer.require_known(body.logit_bias or (), "logit_bias")
        self.renderer.require_known(body.stop_token_ids or (), "stop_token_ids")
        if isinstance(body, ChatBody):
            return await self.renderer.chat(body.turns(), body.tool_use.for_template() if body.tool_use else [])
        return await self.renderer.completion(body.prompt[0])

    def _plan(self, call: Call, prompt: list[int], account: Account) -> Job:
        account.prompt = prompt
        body = call.body
        barred = router.bar(body.sampling(self.cluster.prefill.max_model_len), echo=body.echoes_logprobs)
        route, reason = router.choose(
            call.forced_route, prefill_up=self.prefill.up, decode_up=self.decode.up, barred=barred
        )
        context = router.context_tokens(route, self.cluster)
        # vLLM counts every choice on its own; the worker's cells are there once.
        sharing = 1 if route == "gpu" else body.choices
        max_tokens = router.fit(len(prompt), body.token_limit, context, sharing)
        account.route, account.reason = route, reason
        codec = self._codec(call) if route == "split" else None
        account.codec = codec
        account.alternative = costs.cpu_prefill(len(prompt), self.decode.status)
        return Job(
            call.request_id,
            prompt,
            body.sampling(max_tokens),
            codec or "raw",
            self.cluster.link.transfer_deadline_s,
            body.choices,
            body.echoes_logprobs,
        )

    def _codec(self, call: Call) -> str:
        possible = self.decode.welcome.codecs if self.decode.welcome else ()
        return router.choose_codec(call.codec, self.cluster.link.codec, possible)

    def _fail_over(self, call: Call, lost: handoff.KVLostError, account: Account) -> Job:
        """Choose the route that finishes a request whose KV was lost; raises the loss where nothing may."""
        vllm_may = self.prefill.up and router.unknown_to_vllm(lost.rest.sampling) is None
        if call.forced_route is not None or not (vllm_may or self.decode.up):
            raise lost.error
        # vLLM has the prompt in its prefix cache.
        account.route = "gpu" if vllm_may else "cpu"
        account.reason, account.failed_over = "kv_lost", lost.error.code
        account.carried_tokens, account.route_tokens = lost.sent_tokens, 0
        log.warning("KV lost, going on", request_id=call.request_id, route=account.route, reason=str(lost.error))
        # The worker may not have let go of the first reservation yet.
        return lost.rest._replace(request_id=f"{call.request_id}-again")

    def _take(self, job: Job, account: Account) -> Pieces:
        match account.route:
            case "gpu":
                return handoff.gpu(job, self.prefill, account)
            case "cpu":
                return handoff.cpu(job, self.decode, account)
            case _:
                return handoff.split(job, self.prefill, self.decode, account)
