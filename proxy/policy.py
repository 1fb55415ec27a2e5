"""Where a request goes: a pure function of what was known, all of it in one struct, so that it can be replayed.

For every route that is open, and every worker that could serve it, :func:`predictions` adds up what the parts would
take; :func:`decide` picks by the policy:

==============  ==================================================================================================
policy          what is smallest
==============  ==================================================================================================
``min_ttft``    time to first token; where that is equal, end to end
``min_e2e``     time until the last token, on average of all that are in flight (``mixing.py``)
``max_goodput`` the larger of ttft / objective and tpot / objective: the request goes where most of its objectives is
                left, and where none can be met, where least is missed. Without objectives as ``min_e2e``
``round_robin`` nothing: whole requests to vLLM and to the workers in turn, the replicated baseline
==============  ==================================================================================================
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from proxy import mixing
from proxy.costs import Cost
from proxy.router import ROUTES, Reason, Route
from transfer.config import PolicyName

# A preferred worker is taken although another would be sooner by this share, and has this much less of its sequences
# taken.
_AS_GOOD = 0.10
_MORE_LOAD = 0.25
# A route that was taken less often than this is tried, by one request at a time, if it seems no slower than so many
# times the best; a codec, where waiting for KV takes such a share of the prefill's time.
_TRIES = 2
_TRY_WITHIN = 2.0
_TRY_CODEC_FROM = 0.2
# Fewer tokens than this a worker computes before vLLM's first frame has arrived, where nothing is known.
ALWAYS_LOCAL_TOKENS = 32


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """What is to be done. ``routes`` are open; with a ``reason`` it is known already why one is taken.

    ``answer_tokens`` is what each of ``choices`` is expected to have. Objectives are 0 where there are none. ``turn``
    counts round-robin. The request ``may_try`` what is not known. With ``worker_samples`` vLLM's first token is of no
    use. So many others are ``arriving``: here, and not placed yet.
    """

    prompt_tokens: int
    answer_tokens: int
    choices: int
    routes: tuple[Route, ...]
    reason: Reason | None
    policy: PolicyName
    slo_ttft_ns: int
    slo_tpot_ns: int
    turn: int
    may_try: bool
    worker_samples: bool
    arriving: int = 0


class VllmFacts(msgspec.Struct, frozen=True, array_like=True):
    """The prefill node: ``prefill`` by (new tokens, requests), ``step`` by (steps, sequences, context tokens).

    ``backlog_ns`` of prefills stand before this one; ``sequences`` decode there or will, ``context_tokens`` in all.
    ``cached_tokens`` of the prompt are thought to be in vLLM's prefix cache.
    """

    prefill: Cost | None
    step: Cost | None
    backlog_ns: int
    sequences: int
    context_tokens: int
    cached_tokens: int


class CodecFacts(msgspec.Struct, frozen=True, array_like=True):
    """A codec that may carry this request's KV; ``exposed`` by (tokens sent, transfers), None if it is not known."""

    name: str
    exposed: Cost | None


class WorkerFacts(msgspec.Struct, frozen=True, array_like=True):
    """A decode worker: ``prefill`` by (new tokens, requests, new tokens x sequences beside), ``step`` as for vLLM.

    ``queue_ns`` pass before it has room; ``load`` is the share of its sequences that is taken. ``held_tokens`` of the
    prompt need neither computing nor sending. ``codecs`` are those that may be used, the preferred one first; none if
    split cannot go there. Workers are listed as they are preferred.
    """

    name: str
    prefill: Cost | None
    step: Cost | None
    queue_ns: int
    backlog_ns: int
    load: float
    sequences: int
    context_tokens: int
    held_tokens: int
    codecs: tuple[CodecFacts, ...]


class Inputs(msgspec.Struct, frozen=True, array_like=True):
    """All that a decision is made from."""

    ask: Ask
    vllm: VllmFacts
    workers: tuple[WorkerFacts, ...]


class Prediction(msgspec.Struct, frozen=True):
    """What a route would take from the decision on: to the first token, for each one after it, and in all.

    ``samples`` is the least number of observations behind any part.
    """

    ttft_ns: int
    tpot_ns: int
    e2e_ns: int
    samples: int


class Plan(NamedTuple):
    """One way to serve a request; ``predicted`` is None where something about it is not known."""

    route: Route
    worker: str | None
    codec: str | None
    predicted: Prediction | None
    queue_ns: int = 0
    load: float = 0.0


class Decision(NamedTuple):
    """What was decided, why, and what each open route was predicted to take, by the best worker.

    ``patience_ns``: longer than this the worker's queue is not worth waiting in; None where nothing else is better.
    """

    route: Route
    worker: str | None
    codec: str | None
    reason: Reason
    predicted: dict[Route, Prediction]
    patience_ns: int | None = None


def replay(inputs: Any) -> Decision:
    """The decision that ``inputs``, an :class:`Inputs` or what a ledger entry's JSON has of one, led to."""
    return decide(msgspec.convert(msgspec.to_builtins(inputs), Inputs))


def decide(inputs: Inputs) -> Decision:
    """The route, the worker, the codec. ``inputs.ask.routes`` are not empty, and each can be served by some node."""
    ask = inputs.ask
    possible = {route: plans for route in ask.routes if (plans := _plans(inputs, route))}
    best = {route: _best(ask, plans) for route, plans in possible.items()}
    known = {route: plan.predicted for route, plan in best.items() if plan.predicted}
    plan, reason = _pick(inputs, list(best.values()))
    others = [other for plans in possible.values() for other in plans if other.worker != plan.worker]
    return Decision(plan.route, plan.worker, plan.codec, reason, known, _patience_ns(ask, plan, others))


def _pick(inputs: Inputs, plans: list[Plan]) -> tuple[Plan, Reason]:
    ask = inputs.ask
    if len(plans) == 1:
        return plans[0], ask.reason or ask.policy
    if ask.policy == "round_robin" and ask.reason is None:
        whole = [plan for plan in plans if plan.route != "split"] or plans
        return whole[ask.turn % len(whole)], "round_robin"
    known = [plan for plan in plans if plan.predicted]
    if not known:
        return plans[0], ask.reason or "cold"
    first = _first(inputs, known)
    if ask.may_try and ask.reason is None:
        for plan in plans:
            if plan is not first and _is_worth_a_try(ask, plan, first):
                return plan, "explores"
    return first, ask.reason or ask.policy


def _first(inputs: Inputs, plans: list[Plan]) -> Plan:
    """The best of ``plans``, which are predicted, one for each route; by end to end, the one best for all in flight."""
    ask, vllm = inputs.ask, inputs.vllm
    first = min(plans, key=lambda plan: _rank(ask, plan))
    by_route = {plan.route: plan for plan in plans}
    at_workers = [plan for plan in plans if plan.route != "gpu"]
    in_flight = vllm.sequences + sum(worker.sequences for worker in inputs.workers)
    if ask.reason or not in_flight + ask.arriving or not at_workers or not _by_e2e(ask):
        return first
    there = min(at_workers, key=lambda plan: _rank(ask, plan))
    load = _load(inputs, there)
    if load is None or there.queue_ns:
        return first
    at_vllm = round(vllm.sequences / ask.choices)
    return by_route[mixing.place(load, at_vllm, round(in_flight / ask.choices) - at_vllm, ask.arriving, by_route)]


def _by_e2e(ask: Ask) -> bool:
    return ask.policy == "min_e2e" or (ask.policy == "max_goodput" and not (ask.slo_ttft_ns or ask.slo_tpot_ns))


def _load(inputs: Inputs, plan: Plan) -> mixing.Load | None:
    """The request as ``mixing`` wants it, at ``plan``'s worker; None where a cost is not known."""
    ask, vllm = inputs.ask, inputs.vllm
    worker = next(each for each in inputs.workers if each.name == plan.worker)
    if vllm.prefill is None or vllm.step is None or worker.step is None:
        return None
    new_tokens, local_tokens = ask.prompt_tokens - vllm.cached_tokens, ask.prompt_tokens - worker.held_tokens
    exposed = next((codec.exposed for codec in worker.codecs if codec.exposed), None)
    return mixing.Load(
        prefill_ns=vllm.prefill.at(new_tokens, 0),
        latency_ns=vllm.prefill.at(0, 1),
        prefill_crowding=vllm.prefill.crowding,
        local_ns=worker.prefill.at(local_tokens, 0, 0) if worker.prefill else 0,
        local_latency_ns=worker.prefill.at(0, 1, 0) if worker.prefill else 0,
        exposed_ns=exposed.at(local_tokens, 1) if exposed else 0,
        steps=max(1, ask.answer_tokens - 1),
        sequences=ask.choices,
        context_tokens=_own_tokens(ask),
        vllm=vllm.step,
        worker=worker.step,
        workers=len(inputs.workers),
    )


def _is_worth_a_try(ask: Ask, plan: Plan, first: Plan) -> bool:
    if plan.predicted is None:
        return True
    return plan.predicted.samples < _TRIES and _rank(ask, plan)[0] <= _TRY_WITHIN * _rank(ask, first)[0]


def _rank(ask: Ask, plan: Plan) -> tuple[float, float]:
    """What the policy has least of; then what decides between equals. ``plan`` is predicted."""
    predicted = plan.predicted
    if predicted is None:
        return float("inf"), float("inf")
    if _by_e2e(ask):
        return predicted.e2e_ns, predicted.ttft_ns
    match ask.policy:
        case "min_ttft":
            return predicted.ttft_ns, predicted.e2e_ns
        case "max_goodput":
            ttft = predicted.ttft_ns / ask.slo_ttft_ns if ask.slo_ttft_ns else 0.0
            tpot = predicted.tpot_ns / ask.slo_tpot_ns if ask.slo_tpot_ns else 0.0
            return max(ttft, tpot), predicted.e2e_ns
        case _:
            return predicted.e2e_ns, predicted.ttft_ns


def _plans(inputs: Inputs, route: Route) -> list[Plan]:
    """All ways to take ``route``, in the order in which workers are preferred."""
    if route == "gpu":
        return [Plan("gpu", None, None, _by_gpu(inputs))]
    if route == "cpu":
        return [_by_cpu(inputs, worker) for worker in inputs.workers]
    return [_by_split(inputs, worker) for worker in inputs.workers if worker.codecs]


def _best(ask: Ask, plans: list[Plan]) -> Plan:
    """The best worker, or the preferred one among those that are about equal or if one is not known."""
    if any(plan.predicted is None for plan in plans):
        soonest_ns = min(plan.queue_ns for plan in plans)
        good = [plan for plan in plans if plan.queue_ns == soonest_ns]
    else:
        least = min(_rank(ask, plan) for plan in plans)[0]
        good = [plan for plan in plans if _rank(ask, plan)[0] <= least * (1 + _AS_GOOD)]
    most_load = min(plan.load for plan in good) + _MORE_LOAD
    return next(plan for plan in good if plan.load <= most_load)


def _by_gpu(inputs: Inputs) -> Prediction | None:
    ask, vllm = inputs.ask, inputs.vllm
    if vllm.prefill is None or vllm.step is None:
        return None
    new_tokens, crowd = ask.prompt_tokens - vllm.cached_tokens, _workers_busy(inputs)
    ttft_ns = vllm.backlog_ns + vllm.prefill.at(new_tokens, 1, crowd=crowd)
    step_ns = _step_ns(vllm.step, ask, vllm.sequences, vllm.context_tokens, crowd)
    # Those that end are followed by others, whose prompts are computed between the steps.
    others_ns = vllm.prefill.at(new_tokens, 0, crowd=crowd) * vllm.sequences
    return _prediction(ask, ttft_ns, others_ns, step_ns, min(vllm.prefill.samples, vllm.step.samples))


def _by_cpu(inputs: Inputs, worker: WorkerFacts) -> Plan:
    ask = inputs.ask
    predicted = None
    if worker.prefill is not None and worker.step is not None:
        crowd = _vllm_busy(inputs)
        prefill_ns = _local_prefill_ns(worker.prefill, worker, ask.prompt_tokens - worker.held_tokens, crowd)
        step_ns = _step_ns(worker.step, ask, worker.sequences, worker.context_tokens, crowd)
        samples = min(worker.prefill.samples, worker.step.samples)
        predicted = _prediction(ask, worker.queue_ns + prefill_ns, 0, step_ns, samples)
    return Plan("cpu", worker.name, None, predicted, worker.queue_ns, worker.load)


def _by_split(inputs: Inputs, worker: WorkerFacts) -> Plan:
    ask, vllm = inputs.ask, inputs.vllm
    codec = _codec(inputs, worker)
    plan = Plan("split", worker.name, codec.name, None, worker.queue_ns, worker.load)
    if vllm.prefill is None or worker.step is None:
        return plan
    new_tokens = ask.prompt_tokens - vllm.cached_tokens
    prefill_ns = vllm.backlog_ns + vllm.prefill.at(new_tokens, 1, crowd=_workers_busy(inputs))
    step_ns = _step_ns(worker.step, ask, worker.sequences, worker.context_tokens, _vllm_busy(inputs))
    exposed_ns = codec.exposed.at(ask.prompt_tokens - worker.held_tokens, 1) if codec.exposed else 0
    samples = min(vllm.prefill.samples, worker.step.samples, codec.exposed.samples if codec.exposed else 0)
    ttft_ns = worker.queue_ns + prefill_ns
    if ask.worker_samples:
        ttft_ns, exposed_ns = ttft_ns + exposed_ns + step_ns, 0
    return plan._replace(predicted=_prediction(ask, ttft_ns, exposed_ns, step_ns, samples))


def _prediction(ask: Ask, ttft_ns: int, more_ns: int, step_ns: int, samples: int) -> Prediction:
    """``more_ns`` pass after the first token beside the steps."""
    rest_tokens = max(0, ask.answer_tokens - 1)
    rest_ns = more_ns + step_ns * rest_tokens if rest_tokens else 0
    return Prediction(ttft_ns, round(rest_ns / max(1, rest_tokens)), ttft_ns + rest_ns, samples)


def _step_ns(step: Cost, ask: Ask, sequences: int, context_tokens: int, crowd: float) -> int:
    """A decode step with this request in the batch."""
    return step.at(1, sequences + ask.choices, context_tokens + _own_tokens(ask), crowd=crowd)


def _own_tokens(ask: Ask) -> int:
    """What steps look at of this request, half of its answer made."""
    return ask.prompt_tokens + ask.choices * ask.answer_tokens // 2


def _workers_busy(inputs: Inputs) -> float:
    return float(any(worker.sequences or worker.backlog_ns for worker in inputs.workers))


def _vllm_busy(inputs: Inputs) -> float:
    return float(inputs.vllm.sequences > 0 or inputs.vllm.backlog_ns > 0)


def _local_prefill_ns(prefill: Cost, worker: WorkerFacts, new_tokens: int, crowd: float) -> int:
    return worker.backlog_ns + prefill.at(new_tokens, 1, new_tokens * worker.sequences, crowd=crowd)


def _codec(inputs: Inputs, worker: WorkerFacts) -> CodecFacts:
    """The preferred codec, or one under which less of the transfer shows.

    One that was never used is tried where KV takes much of what a request waits for.
    """
    tokens = inputs.ask.prompt_tokens - worker.held_tokens
    preferred = worker.codecs[0]
    known = [codec for codec in worker.codecs if codec.exposed]
    if preferred.exposed is None or inputs.vllm.prefill is None:
        return preferred
    exposed_ns = preferred.exposed.at(tokens, 1)
    prefill_ns = inputs.vllm.prefill.at(inputs.ask.prompt_tokens - inputs.vllm.cached_tokens, 1)
    if exposed_ns < _TRY_CODEC_FROM * prefill_ns:
        return preferred
    untried = [codec for codec in worker.codecs if codec.exposed is None]
    if inputs.ask.may_try and untried:
        return untried[0]
    return min(known, key=lambda codec: codec.exposed.at(tokens, 1) if codec.exposed else 0)


def _patience_ns(ask: Ask, plan: Plan, others: list[Plan]) -> int | None:
    """How long waiting for the plan's worker may take before another node would have been sooner."""
    known = [other.predicted.e2e_ns for other in others if other.predicted]
    if ask.reason == "forced" or ask.policy == "round_robin" or plan.predicted is None or not known:
        return None
    return max(0, min(known) - (plan.predicted.e2e_ns - plan.queue_ns))


def computes_the_rest(inputs: Inputs, worker: str | None, codec: str | None, reused_tokens: int) -> bool:
    """Whether ``worker``, which turns out to hold ``reused_tokens`` of the prompt, had better compute the rest itself.

    Where the costs are not known, it computes a few tokens.
    """
    facts = next((each for each in inputs.workers if each.name == worker), None)
    missing_tokens = inputs.ask.prompt_tokens - reused_tokens
    if not reused_tokens or facts is None:
        return False
    vllm = inputs.vllm
    if facts.prefill is None or vllm.prefill is None:
        return missing_tokens <= ALWAYS_LOCAL_TOKENS
    here_ns = _local_prefill_ns(facts.prefill, facts, missing_tokens, _vllm_busy(inputs))
    there_ns = vllm.backlog_ns + vllm.prefill.at(inputs.ask.prompt_tokens - vllm.cached_tokens, 1)
    if inputs.ask.policy != "min_ttft" or inputs.ask.worker_samples:
        exposed = next((each.exposed for each in facts.codecs if each.name == codec), None)
        there_ns += exposed.at(missing_tokens, 1) if exposed else 0
    return here_ns <= there_ns


def alternatives(decision: Decision) -> list[Route]:
    """The other routes that were predicted, the one that was thought soonest first."""
    others = [route for route in ROUTES if route in decision.predicted and route != decision.route]
    return sorted(others, key=lambda route: decision.predicted[route].e2e_ns)
