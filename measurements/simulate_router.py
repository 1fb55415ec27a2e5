"""The proxy's own policy over a simulated cluster: what it would know there, and what it decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from measurements.profiles import CodecCost, Setup
from measurements.roofline import prefill_seconds, step_seconds, wire_seconds
from measurements.simulate_engine import Engine
from measurements.workloads import Ask as Asked
from proxy.costs import Cost
from proxy.facts import Ask, CodecFacts, Inputs, VllmFacts, WorkerFacts
from proxy.policy import decide
from proxy.router import Route

_NS_PER_S = 1e9
# As often as it takes for nothing to be tried.
_SEEN = 100


def route(
    setup: Setup,
    codec: CodecCost,
    gpu: Engine,
    cpus: Sequence[Engine],
    decoding: Mapping[Engine, int],
    arriving: int,
    asked: Asked,
) -> tuple[Route, Engine]:
    """The route for ``asked``, and the worker; engines decode, or will, so many requests, and so many more come.

    Costs are what the simulation itself goes by, at this request's size.
    """
    open_routes: list[Route] = ["split", "gpu", "cpu"]
    if not gpu.fits(asked.prompt_tokens, asked.output_tokens - 1):
        open_routes.remove("gpu")
    if not any(cpu.fits(asked.prompt_tokens, asked.output_tokens - 1) for cpu in cpus):
        open_routes = ["gpu"]
    ask = Ask(
        prompt_tokens=asked.prompt_tokens,
        answer_tokens=asked.output_tokens,
        choices=1,
        routes=tuple(open_routes),
        reason=None,
        policy="min_e2e",
        slo_ttft_ns=0,
        slo_tpot_ns=0,
        turn=0,
        may_try=False,
        worker_samples=False,
        arriving=arriving,
    )
    crowding = 1.0 if setup.shared_cores else 0.0
    own_tokens = asked.prompt_tokens + asked.output_tokens // 2
    tail_s = wire_seconds(setup.link, codec, setup.model, asked.prompt_tokens) / setup.model.num_layers
    exposed = Cost((0.0, (tail_s + setup.link.handoff_ms / 1e3) * _NS_PER_S), _SEEN)
    vllm = VllmFacts(
        prefill=_prefill(gpu, asked.prompt_tokens, crowding, 2),
        step=_step(gpu, own_tokens, crowding),
        backlog_ns=_backlog_ns(gpu),
        sequences=decoding[gpu],
        context_tokens=decoding[gpu] * own_tokens,
        cached_tokens=gpu.lent(asked.shared_tokens),
    )
    workers = tuple(
        WorkerFacts(
            name=str(number),
            prefill=_prefill(cpu, asked.prompt_tokens, crowding, 3),
            step=_step(cpu, own_tokens, crowding),
            queue_ns=0,
            backlog_ns=_backlog_ns(cpu),
            load=min(1.0, decoding[cpu] / cpu.device.max_sequences),
            sequences=decoding[cpu],
            context_tokens=decoding[cpu] * own_tokens,
            held_tokens=cpu.lent(asked.shared_tokens),
            codecs=(CodecFacts(codec.name, exposed),),
        )
        for number, cpu in enumerate(cpus)
    )
    decision = decide(Inputs(ask, vllm, workers))
    return decision.route, cpus[int(decision.worker or 0)]


def _prefill(engine: Engine, tokens: int, crowding: float, terms: int) -> Cost:
    """By tokens and requests, and nothing by a third term if there is one."""
    token_ns = prefill_seconds(engine.device, engine.model, tokens) / tokens * _NS_PER_S
    return Cost((token_ns, engine.device.request_ms * 1e6, 0.0)[:terms], _SEEN, crowding=crowding)


def _step(engine: Engine, context_tokens: int, crowding: float) -> Cost:
    """A line through steps of one sequence and of many, at this context."""
    many = 16
    one_ns, many_ns = (
        step_seconds(engine.device, engine.model, [context_tokens] * count, []) * _NS_PER_S for count in (1, many)
    )
    slope_ns = (many_ns - one_ns) / (many - 1)
    return Cost((max(0.0, one_ns - slope_ns), slope_ns, 0.0), _SEEN, crowding=crowding)


def _backlog_ns(engine: Engine) -> int:
    tokens = engine.queued_prompt_tokens
    return round(prefill_seconds(engine.device, engine.model, tokens) * _NS_PER_S) if tokens else 0
