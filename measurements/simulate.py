"""The architectures, and the router, under a workload, as a discrete-event simulation (simpy)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from itertools import count
from typing import Any, Literal, NamedTuple

import simpy

from measurements.profiles import CodecCost, Setup
from measurements.roofline import wire_seconds
from measurements.simulate_engine import Cores, Engine, NoRoomError, Process
from measurements.simulate_router import route
from measurements.workloads import Ask, Workload, asks

Architecture = Literal["gpu", "cpu", "replicated", "split", "auto"]
ARCHITECTURES: tuple[Architecture, ...] = ("gpu", "cpu", "replicated", "split", "auto")

# Requests one after another that every client makes.
ROUNDS = 3


class Answer(NamedTuple):
    """What one client saw of one request, in seconds; ``tpot_s`` as the glossary has it."""

    client: int
    ttft_s: float
    tpot_s: float
    e2e_s: float
    output_tokens: int


class Run(NamedTuple):
    """All answers of one simulation, by client in order, and what happened on the way."""

    answers: list[Answer]
    preemptions: int


class Cluster:
    """The two nodes and the wire between them. ``codec`` is for split requests, of ``auto`` as well."""

    def __init__(self, env: simpy.Environment, setup: Setup, codec: CodecCost) -> None:
        self.env = env
        self.setup = setup
        self.codec = codec
        self._shared = shared = Cores(env) if setup.shared_cores else None
        self.gpus = [Engine(env, setup.gpu, setup.model, shared or Cores(env)) for _ in range(setup.gpu.nodes)]
        self.cpus = [Engine(env, setup.cpu, setup.model, shared or Cores(env)) for _ in range(setup.cpu.nodes)]
        self.wire = simpy.Resource(env, capacity=1)
        self.proxy = simpy.Resource(env, capacity=1)
        self._turn = count()
        # Requests that an engine decodes, or will.
        self._decoding: Counter[Engine] = Counter()

    def answer(self, architecture: Architecture, ask: Ask) -> Generator[simpy.Event, Any, float]:
        """Serve ``ask``; returns when its first token was known."""
        with self.proxy.request() as turn:
            yield turn
            yield self.env.timeout(self.setup.arrival_ms / 1e3)
        gpu, cpu = (min(engines, key=lambda each: each.load) for engines in (self.gpus, self.cpus))
        if architecture == "auto":
            arriving = len(self.proxy.queue)
            architecture, cpu = route(self.setup, self.codec, gpu, self.cpus, self._decoding, arriving, ask)
        if architecture == "split":
            return (yield from self._split(ask, cpu))
        engine = {"gpu": gpu, "cpu": cpu}.get(architecture)
        if engine is None:
            # Round robin over whole nodes, blind to their speed: the baseline that people build.
            engine = (gpu, cpu)[next(self._turn) % 2]
        self._decoding[engine] += 1
        yield self.env.timeout(engine.device.request_ms / 1e3)
        sequence = engine.submit(ask.prompt_tokens, ask.output_tokens - 1, shared=ask.shared_tokens)
        yield sequence.prefilled
        first_s = self.env.now
        yield sequence.done
        self._decoding[engine] -= 1
        return first_s

    def _hand_over(self, seconds: float) -> Process:
        """What a handoff adds is work, of encoding, frames and injection: it takes cores that the engines share."""
        if self._shared:
            yield from self._shared.compute(seconds)
        else:
            yield self.env.timeout(seconds)

    def _split(self, ask: Ask, worker: Engine) -> Generator[simpy.Event, Any, float]:
        """Reserve, prefill, send while prefill runs, decode: ARCHITECTURE.md, the life of a split request."""
        self._decoding[worker] += 1
        reserved = worker.submit(ask.prompt_tokens, ask.output_tokens - 1, shared=ask.shared_tokens, landing=True)
        yield reserved.admitted
        yield from self._hand_over(self.setup.link.handoff_ms / 1e3)
        missing = ask.prompt_tokens - reserved.borrowed
        sending: list[simpy.Event] = []

        def computed(tokens: int, end_s: float) -> None:
            # What vLLM found in its prefix cache and the worker lacks leaves with what is computed.
            share = tokens / (ask.prompt_tokens - sequence.borrowed)
            sending.append(self.env.process(self._send(missing * share, end_s)))

        engine = min(self.gpus, key=lambda each: each.load)
        yield self.env.timeout(engine.device.request_ms / 1e3)
        sequence = engine.submit(ask.prompt_tokens, 0, shared=ask.shared_tokens, computed=computed)
        yield sequence.prefilled
        first_s = self.env.now
        yield simpy.AllOf(self.env, sending)
        worker.land(reserved, missing)
        yield reserved.done
        self._decoding[worker] -= 1
        return first_s

    def _send(self, tokens: float, end_s: float) -> Generator[simpy.Event, Any, None]:
        """One chunk's KV: layers leave as they are computed, the last one when the step ends at ``end_s``."""
        layers = self.setup.model.num_layers
        began_s = self.env.now
        yield self.env.timeout((end_s - began_s) / layers)
        whole_s = wire_seconds(self.setup.link, self.codec, self.setup.model, tokens)
        with self.wire.request() as turn:
            yield turn
            yield self.env.timeout(whole_s)
        yield self.env.timeout(max(end_s + whole_s / layers - self.env.now, 0.0))


def simulate(
    setup: Setup,
    architecture: Architecture,
    codec: CodecCost,
    workload: Workload,
    concurrency: int,
    requests: int = ROUNDS,
) -> Run | None:
    """``concurrency`` clients with ``requests`` each, one after another; None if some request fits nowhere."""
    env = simpy.Environment()
    cluster = Cluster(env, setup, codec)
    answers: list[Answer] = []
    try:
        plans = [list(asks(workload, client, requests)) for client in range(concurrency)]
        env.run(until=env.process(_clients(env, cluster, architecture, workload, plans, answers)))
    except NoRoomError:
        return None
    answers.sort(key=lambda answer: answer.client)
    return Run(answers, sum(engine.preemptions for engine in (*cluster.gpus, *cluster.cpus)))


def _clients(
    env: simpy.Environment,
    cluster: Cluster,
    architecture: Architecture,
    workload: Workload,
    plans: list[list[Ask]],
    answers: list[Answer],
) -> Generator[simpy.Event, Any, None]:
    def serve(client: int, ask: Ask) -> Generator[simpy.Event, Any, None]:
        began_s = env.now
        first_s = yield from cluster.answer(architecture, ask)
        tpot_s = (env.now - first_s) / (ask.output_tokens - 1)
        answers.append(Answer(client, first_s - began_s, tpot_s, env.now - began_s, ask.output_tokens))

    def client(number: int) -> Generator[simpy.Event, Any, None]:
        for ask in plans[number]:
            yield env.process(serve(number, ask))

    if workload.together:
        for asked in zip(*plans, strict=True):
            yield simpy.AllOf(env, [env.process(serve(number, ask)) for number, ask in enumerate(asked)])
    else:
        yield simpy.AllOf(env, [env.process(client(number)) for number in range(len(plans))])
