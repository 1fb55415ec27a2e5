"""Gathers what is known when a request comes, and has the policy decide."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from proxy.decode_node import DecodeNode
from proxy.estimates import Estimates
from proxy.facts import Ask, CodecFacts, Inputs, VllmFacts, WorkerFacts
from proxy.load import Occupancy, Watch
from proxy.nodes import DecodePool
from proxy.placement import ranked
from proxy.policy import Decision, decide
from proxy.prefill_node import PrefillNode
from proxy.prefill_pool import PrefillPool
from proxy.router import Open, Route, possible_codecs
from transfer.config import Cluster
from transfer.errors import CodecError, LinkError, RequestError

if TYPE_CHECKING:
    from proxy.handoff import Job

# A worker that has just refused a request for want of room has none.
FULL_NS = 250_000_000
# A worker's status is about the second before it, and up to a second old.
_STATUS_NS = 2_500_000_000
# So many requests tell how many are in flight at a time.
_LATELY = 8
_NS_PER_MS = 1_000_000


class Planned(NamedTuple):
    """A decision and all that it was made from."""

    decision: Decision
    inputs: Inputs

    @property
    def seen(self) -> Inputs:
        """The inputs with the chosen prefill node in front."""
        return self.inputs.at(self.decision.prefill_node)


class Planner:
    """Owns what is learned, and what the nodes are busy with, as far as this proxy knows."""

    def __init__(self, cluster: Cluster, prefills: PrefillPool, workers: DecodePool) -> None:
        self.estimates = Estimates()
        # By all workers together.
        self.decoding = Occupancy()
        self._cluster = cluster
        self._prefills = prefills
        self._workers = workers
        self._turn = 0
        self._trying: set[str] = set()
        self._arriving = 0
        self._serving = Occupancy()
        self._in_flight = 0
        # How many were in flight, on average, while each of the last ones was.
        self._lately: deque[float] = deque(maxlen=_LATELY)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """A request is served in the body."""
        self._in_flight += 1
        try:
            with self._serving.working(1), Watch(self._serving, self._serving) as watch:
                yield
        finally:
            self._in_flight -= 1
        self._lately.append(watch.beside(0, 0).sequences)

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """A request will be planned after the body."""
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    def plan(self, job: Job, open_routes: Open, *, waited_ns: int = 0) -> Planned:
        """Where ``job`` goes.

        It has waited for room in a worker for ``waited_ns`` already: another wait is expected to be no shorter.

        Raises :class:`LinkError` if no node is left for any of the routes, :class:`RequestError` or
        :class:`CodecError` if no codec can do what is asked for and only split is open.
        """
        nodes = self._nodes(job, open_routes)
        vllm, *others = self._prefill_nodes(job)
        inputs = Inputs(
            self._ask(job, open_routes),
            vllm,
            tuple(self._worker_facts(job, node, waited_ns, self._codecs(job, node)) for node in nodes),
            tuple(others),
        )
        routes = _served(open_routes.routes, inputs.workers)
        if "split" in open_routes.routes and "split" not in routes and (nodes and not job.prior_output):
            self._explain(job, nodes, alone=not routes)
        if not routes:
            raise LinkError(f"the decode node is down: {self._workers.down_reason or 'it has just failed'}")
        inputs = msgspec.structs.replace(inputs, ask=msgspec.structs.replace(inputs.ask, routes=routes))
        return Planned(decide(inputs), inputs)

    def took(self, job: Job) -> None:
        """What was planned for ``job`` is carried out."""
        if job.planned is None:
            return
        decision = job.planned.decision
        if decision.reason == "round_robin":
            self._turn += 1
        if decision.reason in ("explores", "cold"):
            self._trying.add(job.request_id)
        node = self._workers.nodes.get(decision.worker or "")
        if node:
            node.breaker.tried(time.monotonic_ns())

    def ended(self, request_id: str) -> None:
        """The request is over, whatever became of it."""
        self._trying.discard(request_id)

    def _nodes(self, job: Job, open_routes: Open) -> list[DecodeNode]:
        """Workers that may get the request, the preferred one first; one that has failed it only if there is no other
        way.
        """
        if open_routes.routes == ("gpu",):
            return []
        up = [node for node in self._workers if node.takes_requests and node.welcome]
        wanted = [node for node in up if node.name not in job.avoid]
        now_ns = time.monotonic_ns()
        left = [node for node in wanted if not node.breaker.failing(now_ns)] or wanted
        if not left and open_routes.routes == ("cpu",) and not job.forced:
            left = up
        by_name = {node.name: node for node in left}
        return [by_name[name] for name in ranked(job.prompt, [node.candidate for node in left])]

    def _ask(self, job: Job, open_routes: Open) -> Ask:
        proxy = self._cluster.proxy
        sampling = job.sampling
        expected = self.estimates.answers.expected(job.limit, sampling.max_tokens)
        return Ask(
            prompt_tokens=len(job.prompt),
            answer_tokens=sampling.max_tokens if sampling.ignore_eos else max(expected, sampling.min_tokens),
            choices=job.choices,
            routes=open_routes.routes,
            reason=open_routes.reason,
            policy=proxy.policy,
            slo_ttft_ns=_or_configured(job.objectives.ttft_ns, proxy.slo_ttft_ms),
            slo_tpot_ns=_or_configured(job.objectives.tpot_ns, proxy.slo_tpot_ms),
            turn=self._turn,
            may_try=not self._trying,
            worker_samples=job.decoder_samples,
            arriving=self._expected(),
        )

    def _expected(self) -> int:
        """How many more will be in flight soon: those that have come, or as many as lately where there is not only one.

        What begins alone may well stay alone.
        """
        if not self._in_flight + self._arriving or not self._lately:
            return self._arriving
        return max(self._arriving, round(fmean(self._lately)) - self._in_flight - 1)

    def _prefill_nodes(self, job: Job) -> list[VllmFacts]:
        """Prefill nodes that may get the request, the preferred one first: one that has more of its prefix.

        Where none may, what all are busy with still slows workers down.
        """
        facts = [self._vllm_facts(job, node) for node in self._prefills.without(job.avoid) or self._prefills]
        by_name = {each.name: each for each in facts}
        names = ranked(job.prompt, facts)
        return sorted((by_name[name] for name in names), key=lambda each: each.cached_tokens, reverse=True)

    def _vllm_facts(self, job: Job, node: PrefillNode) -> VllmFacts:
        caching = self._cluster.prefill.prefix_caching and job.reuse
        load = node.load
        return VllmFacts(
            prefill=self.estimates.vllm_prefill(node.name),
            step=self.estimates.vllm_step(node.name),
            backlog_ns=load.backlog.ns,
            sequences=load.sequences,
            context_tokens=load.context_tokens,
            cached_tokens=load.prefixes.held_tokens(job.prompt, job.tenant) if caching else 0,
            name=node.name,
        )

    def _worker_facts(self, job: Job, node: DecodeNode, waited_ns: int, codecs: tuple[CodecFacts, ...]) -> WorkerFacts:
        estimates, status = self.estimates, node.status
        return WorkerFacts(
            name=node.name,
            prefill=estimates.worker_prefill(node.name, status),
            step=estimates.worker_step(node.name, status, alone=self._prefills.occupancy.idle_ns > _STATUS_NS),
            queue_ns=self._queue_ns(job, node, waited_ns),
            backlog_ns=node.backlog.ns,
            load=node.candidate.load,
            sequences=node.open_sequences,
            context_tokens=node.open_context_tokens,
            held_tokens=self._workers.held(node, job.prompt, job.tenant).tokens if job.reuse else 0,
            codecs=codecs,
        )

    def _queue_ns(self, job: Job, node: DecodeNode, waited_ns: int) -> int:
        """How long until the worker has room: what it said to those that wait, or what its requests take."""
        now_ns = time.monotonic_ns()
        there = node.candidate
        cells = min(job.cells, node.welcome.num_cells if node.welcome else job.cells)
        room = there.free_cells >= cells and there.free_sequences >= job.choices
        if room and now_ns - node.refused_ns > FULL_NS:
            return 0
        said_ns = node.queue_left_ns(now_ns)
        if said_ns is None:
            waiting = 1 + (node.status.queued_requests if node.status else 0)
            most = node.welcome.max_sequences if node.welcome else 1
            said_ns = round(waiting * (self.estimates.worker(node.name).service_ns.value or 0) / most)
        return max(said_ns, waited_ns)

    def _codecs(self, job: Job, node: DecodeNode) -> tuple[CodecFacts, ...]:
        try:
            names = _possible(job, node)
        except (RequestError, CodecError):
            return ()
        known = self.estimates.codecs
        return tuple(CodecFacts(name, known[name].exposed.cost if name in known else None) for name in names)

    def _explain(self, job: Job, nodes: list[DecodeNode], *, alone: bool) -> None:
        """Raise why no worker can be sent KV, where the client asked for a codec or there is no other route."""
        try:
            for node in nodes:
                _possible(job, node)
        except RequestError:
            raise
        except CodecError:
            if alone and all(node.distrusted for node in nodes):
                raise LinkError("no decode worker's cells can be trusted with KV from the wire; see /health") from None
            if alone:
                raise


def _possible(job: Job, node: DecodeNode) -> tuple[str, ...]:
    codecs = node.welcome.codecs if node.welcome else ()
    return possible_codecs(job.codec, job.default_codec, codecs, node.distrusted)


def _served(routes: tuple[Route, ...], workers: tuple[WorkerFacts, ...]) -> tuple[Route, ...]:
    can: Mapping[Route, bool] = {
        "split": any(worker.codecs for worker in workers),
        "gpu": True,
        "cpu": bool(workers),
    }
    return tuple(route for route in routes if can[route])


def _or_configured(asked_ns: int | None, configured_ms: float) -> int:
    return round(configured_ms * _NS_PER_MS) if asked_ns is None else asked_ns
