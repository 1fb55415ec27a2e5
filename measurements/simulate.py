"""The architectures, and the router, under a workload, as a discrete-event simulation (simpy)."""

from __future__ import annotations

from collections.abc import Generator
from itertools import count
from typing import Any, Literal, NamedTuple

import simpy

from measurements.profiles import CodecCost, Setup
from measurements.roofline import prefill_seconds, step_seconds, wire_seconds
from measurements.simulate_engine import Cores, Engine, NoRoomError
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
        shared = Cores(env) if setup.shared_cores else None
        self.gpus = [Engine(env, setup.gpu, setup.model, shared or Cores(env)) for _ in range(setup.gpu.nodes)]
        self.cpus = [Engine(env, setup.cpu, setup.model, shared or Cores(env)) for _ in range(setup.cpu.nodes)]
        self.wire = simpy.Resource(env, capacity=1)
        self.proxy = simpy.Resource(env, capacity=1)
        self._turn = count()

    def answer(self, architecture: Architecture, ask: Ask) -> Generator[simpy.Event, Any, float]:
        """Serve ``ask``; returns when its first token was known."""
        with self.proxy.request() as turn:
            yield turn
            yield self.env.timeout(self.setup.arrival_ms / 1e3)
        if architecture == "auto":
            architecture = self._cheapest(ask)
        if architecture == "split":
            return (yield from self._split(ask))
        nodes = {"gpu": self.gpus, "cpu": self.cpus}.get(architecture)
        if nodes is None:
            # Round robin over whole nodes, blind to their speed: the baseline that people build.
            nodes = (self.gpus, self.cpus)[next(self._turn) % 2]
        engine = min(nodes, key=lambda each: each.load)
        yield self.env.timeout(engine.device.request_ms / 1e3)
        sequence = engine.submit(ask.prompt_tokens, ask.output_tokens - 1, shared=ask.shared_tokens)
        yield sequence.prefilled
        first_s = self.env.now
        yield sequence.done
        return first_s

    def _split(self, ask: Ask) -> Generator[simpy.Event, Any, float]:
        """Reserve, prefill, send while prefill runs, decode: ARCHITECTURE.md, the life of a split request."""
        worker = min(self.cpus, key=lambda each: each.load)
        reserved = worker.submit(ask.prompt_tokens, ask.output_tokens - 1, shared=ask.shared_tokens, landing=True)
        yield reserved.admitted
        yield self.env.timeout(self.setup.link.handoff_ms / 1e3)
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
        return first_s

    def _cheapest(self, ask: Ask) -> Architecture:
        """The route with the least estimated end to end, from what the engines have to do now."""
        gpu, cpu = (min(engines, key=lambda each: each.load) for engines in (self.gpus, self.cpus))
        # What both compute on is halved where both have something to do.
        both = self.setup.shared_cores
        crowd = {gpu: 1 + (both and cpu.load > 0), cpu: 1 + (both and gpu.load > 0)}

        def prefill_s(engine: Engine) -> float:
            own = ask.prompt_tokens - engine.lent(ask.shared_tokens)
            return crowd[engine] * prefill_seconds(engine.device, engine.model, engine.queued_prompt_tokens + own)

        def decode_s(engine: Engine) -> float:
            contexts = [*engine.contexts, ask.prompt_tokens]
            return ask.output_tokens * crowd[engine] * step_seconds(engine.device, engine.model, contexts, [])

        tail_s = wire_seconds(self.setup.link, self.codec, self.setup.model, ask.prompt_tokens)
        tail_s = tail_s / self.setup.model.num_layers + self.setup.link.handoff_ms / 1e3
        estimates: dict[Architecture, float] = {
            "gpu": prefill_s(gpu) + decode_s(gpu),
            "cpu": prefill_s(cpu) + decode_s(cpu),
            "split": prefill_s(gpu) + tail_s + decode_s(cpu),
        }
        decodes_on: dict[Architecture, Engine] = {"gpu": gpu, "cpu": cpu, "split": cpu}
        roomy = [each for each in estimates if decodes_on[each].fits(ask.prompt_tokens, ask.output_tokens - 1)]
        return min(roomy or estimates, key=lambda each: estimates[each])

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
