"""A request from the moment that its prompt is known: where it goes, and where it goes on if that fails."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import msgspec
import structlog

from proxy import costs, handoff, router
from proxy.handoff import Job, NodeFailedError, Pieces, Vllm, WorkerFullError
from proxy.ledger import Account
from proxy.nodes import DecodePool
from proxy.planner import Planner
from proxy.prefill_node import PrefillNode
from proxy.prefill_pool import PrefillPool
from proxy.render import Renderer
from proxy.router import Open, Reason, Route
from proxy.transcript import Transcript
from transfer.config import Cluster
from transfer.errors import IsthmusError, RequestError

# A request is served by so many nodes, one after the other, if they fail it.
MAX_ATTEMPTS = 3
FULL_RETRY_S = 0.05
# What a barred route lacks, in the place of a field's name.
_CONTEXT = "so many tokens"
_EXPORT = "anything while [prefill] export is false"

log = structlog.get_logger()


class Dispatcher:
    """Sends requests to nodes, and learns from what they fail."""

    def __init__(self, cluster: Cluster, prefills: PrefillPool, workers: DecodePool, renderer: Renderer) -> None:
        self.planner = Planner(cluster, prefills, workers)
        self._cluster = cluster
        self._prefills = prefills
        self._workers = workers
        self._renderer = renderer

    def deadline_ns(self) -> int:
        """The deadline of a request that begins to wait now."""
        return time.monotonic_ns() + int(self._cluster.link.transfer_deadline_s * 1e9)

    def plan(self, job: Job, account: Account) -> Job:
        """``job`` with its route, and with as many tokens as that allows where the client has no limit.

        Raises :class:`ContextLengthError` if it has no room there, and what :func:`router.open_routes` and
        :meth:`Planner.plan` raise.
        """
        account.prompt, account.max_tokens = job.prompt, job.limit
        account.alternative = costs.cpu_prefill(len(job.prompt), self._workers.any_status)
        widest = max(self._context_tokens(route) for route in router.ROUTES)
        room = max(1, (widest - len(job.prompt)) // job.choices)
        job = _limited(job, room if job.limit is None else job.limit)
        open_routes = self._open(job)
        planned = self.planner.plan(job, open_routes)
        route = planned.decision.route
        account.route, account.reason = route, planned.decision.reason
        account.predicted, account.decision = planned.decision.predicted, planned.inputs
        return self._fitted(job, route)._replace(planned=planned)

    async def served(self, job: Job, account: Account) -> Pieces:
        """The answer to ``job``, by as many nodes as it takes; what nodes fail with is raised if no other may go on."""
        transcript = Transcript(job, self._renderer.vocabulary)
        request_id = job.request_id
        full_since_ns: int | None = None
        failures = 0
        self.planner.took(job)
        try:
            while True:
                try:
                    async with aclosing(self._take(job, account)) as pieces:
                        async for piece in pieces:
                            yield transcript.take(piece)
                            if transcript.ended:
                                break
                except WorkerFullError as full:
                    full_since_ns = full_since_ns or time.monotonic_ns()
                    job = await self._elsewhere(job, full, full_since_ns, account)
                except NodeFailedError as failed:
                    failures += 1
                    job = self._go_on(job, transcript, failed, account, last=failures == MAX_ATTEMPTS)
                else:
                    self._succeeded(account)
                    return
                if not transcript.left_tokens:
                    yield transcript.end()
                    return
        finally:
            self.planner.ended(request_id)

    async def _elsewhere(self, job: Job, full: WorkerFullError, since_ns: int, account: Account) -> Job:
        """Where ``job`` goes now that its worker is full: there again, or where it is served sooner.

        At the deadline only vLLM is left, which has no cells to wait for; raises the error where it may not be asked.
        """
        with account.meter.stage("reserve"):
            now_ns = time.monotonic_ns()
            if now_ns < job.deadline_ns:
                await asyncio.sleep(FULL_RETRY_S)
                open_routes = self._open(job)
            elif job.forced is None and "gpu" in self._open(job).routes:
                open_routes = Open(("gpu",), "worker_full")
            else:
                raise full.error
            planned = self.planner.plan(job, open_routes, waited_ns=now_ns - since_ns)
            if planned.decision.route != account.route:
                account.route, account.reason = planned.decision.route, "worker_full"
                account.worker = account.codec = None
        if not job.avoid:
            job = self._fitted(job, planned.decision.route)
        job = job._replace(planned=planned)
        self.planner.took(job)
        return job

    def _go_on(self, job: Job, transcript: Transcript, failed: NodeFailedError, account: Account, *, last: bool) -> Job:
        """What is left to do after ``failed``, with its route chosen; raises the error where nobody may do it."""
        self.blame(failed)
        rest = None if last else transcript.rest()
        if rest is None:
            raise failed.error
        # The client has waited for nothing since its last token.
        progress = transcript.num_tokens > account.carried_tokens
        rest = rest._replace(
            avoid=job.avoid | {failed.node},
            deadline_ns=self.deadline_ns() if progress else job.deadline_ns,
            # A node that failed may not have let go of the request yet.
            request_id=f"{rest.request_id}-{len(account.attempts) + 1}",
        )
        try:
            planned = self.planner.plan(rest, self._open(rest))
        except IsthmusError:
            raise failed.error from None
        route = planned.decision.route
        log.warning("a node failed a request, going on", request_id=rest.request_id, route=route, reason=str(failed))
        account.failed(failed.error.code, transcript.num_tokens)
        account.route, account.reason = route, "failed_over"
        rest = rest._replace(planned=planned)
        self.planner.took(rest)
        return rest

    def _open(self, job: Job) -> Open:
        """The routes that ``job`` may take."""
        barred = router.bar(job.sampling, echo=job.echo, prior_output=job.prior_output)
        if not self._cluster.prefill.export:
            barred["split"] = _EXPORT
        if job.avoid:
            late: dict[Route, str] = {"split": "time"} if job.deadline_ns <= time.monotonic_ns() else {}
            narrow: dict[Route, str] = {route: _CONTEXT for route in router.ROUTES if not self._fits(job, route)}
            return self._open_after_failure(job, barred | narrow | late)
        wide = [route for route in router.ROUTES if route not in barred and self._fits(job, route)]
        if wide and not job.forced:
            barred |= {route: _CONTEXT for route in router.ROUTES if route not in barred and route not in wide}
        return router.open_routes(
            job.forced,
            prefill_up=self._prefills.up,
            decode_up=self._workers.up,
            barred=barred,
            prefill_failing=self._prefills.failing,
            decode_failing=self._workers.failing,
        )

    def _open_after_failure(self, job: Job, barred: dict[Route, str]) -> Open:
        reason: Reason = "failed_over"
        routes = router.ways_on(
            job.forced,
            prefill_up=bool(self._prefills.without(job.avoid)),
            another_worker_up=self._workers.another(job.avoid),
            some_worker_up=self._workers.up,
            barred=barred,
        )
        return Open(routes, reason)

    def _fits(self, job: Job, route: Route) -> bool:
        tokens = 1 if job.limit is None and not job.avoid else job.sampling.max_tokens
        return len(job.prompt) + self._sharing(job, route) * tokens <= self._context_tokens(route)

    def _context_tokens(self, route: Route) -> int:
        return router.context_tokens(route, self._cluster, self._workers.sequence_cells)

    def _sharing(self, job: Job, route: Route) -> int:
        """VLLM counts every choice on its own, as streams do; else the worker's cells are there once."""
        return 1 if route == "gpu" or self._workers.sequence_cells else job.choices

    def _fitted(self, job: Job, route: Route) -> Job:
        """With as many tokens as the client wants, or ``route`` has room for."""
        context = self._context_tokens(route)
        max_tokens = router.fit(len(job.prompt), job.limit, context, self._sharing(job, route))
        if job.sampling.min_tokens > max_tokens:
            raise RequestError(f"min_tokens = {job.sampling.min_tokens} is over what fits, {max_tokens}", "min_tokens")
        return _limited(job, max_tokens)

    def _take(self, job: Job, account: Account) -> Pieces:
        vllm = self._vllm(job)
        account.prefill_node = None
        if account.route != "cpu":
            account.prefill_node = vllm.node.name
            vllm.node.breaker.tried(time.monotonic_ns())
        match account.route:
            case "gpu":
                return handoff.gpu(job, vllm, account)
            case "cpu":
                return handoff.cpu(job, vllm, self._workers, account)
            case _:
                return handoff.split(job, vllm, self._workers, account)

    def prefill_node(self, job: Job) -> PrefillNode:
        """The prefill node that was chosen for ``job``."""
        name = job.planned.decision.prefill_node if job.planned else ""
        return self._prefills.nodes.get(name, self._prefills.first)

    def _vllm(self, job: Job) -> Vllm:
        node = self.prefill_node(job)
        tried = job.avoid | {node.name}

        def another() -> bool:
            return len(tried) < MAX_ATTEMPTS and bool(self._prefills.without(tried))

        return Vllm(node, self._prefills.occupancy, self.planner.decoding, self.blame, another)

    def blame(self, failed: NodeFailedError) -> None:
        """A node has failed a request."""
        node = self._prefills.nodes.get(failed.node) or self._workers.nodes.get(failed.node)
        if node:
            node.breaker.failed(time.monotonic_ns())

    def _succeeded(self, account: Account) -> None:
        node = self._workers.nodes.get(account.worker or "")
        if node:
            node.breaker.succeeded()
        prefill_node = self._prefills.nodes.get(account.prefill_node or "")
        if prefill_node:
            prefill_node.breaker.succeeded()


def _limited(job: Job, max_tokens: int) -> Job:
    return job._replace(sampling=msgspec.structs.replace(job.sampling, max_tokens=max_tokens))
