"""Where a request goes: a pure function of what was known, all of it in one struct, so that it can be replayed.

For every route that is open, and every worker that could serve it, ``predictions.py`` adds up what the parts would
take; :func:`decide` picks by the policy. Where there are several prefill nodes it begins with the one by which the
routes through vLLM are best:

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

import math
from typing import Any, NamedTuple

import msgspec

from proxy import mixing
from proxy.facts import ANOTHER_NODE, Ask, Inputs, Prediction, VllmFacts
from proxy.predictions import Plan, load_of, plans
from proxy.router import ROUTES, Reason, Route

# A preferred worker is taken although another would be sooner by this share, and has this much less of its sequences
# taken.
_AS_GOOD = 0.10
_MORE_LOAD = 0.25
# A route that was taken less often than this is tried, by one request at a time, if it seems no slower than so many
# times the best.
_TRIES = 2
_TRY_WITHIN = 2.0
# A preferred prefill node decodes at most so many sequences more than others that are about as good.
_MORE_SEQUENCES = 4


class Decision(NamedTuple):
    """What was decided, why, and what each open route was predicted to take, by the best worker.

    ``patience_ns``: longer than this the worker's queue is not worth waiting in; None where nothing else is better.
    ``prefill_node`` is the one that serves the routes through vLLM.
    """

    route: Route
    worker: str | None
    codec: str | None
    reason: Reason
    predicted: dict[Route, Prediction]
    patience_ns: int | None = None
    prefill_node: str = ""


def replay(inputs: Any) -> Decision:
    """The decision that ``inputs``, an :class:`Inputs` or what a ledger entry's JSON has of one, led to."""
    return decide(msgspec.convert(msgspec.to_builtins(inputs), Inputs))


def decide(inputs: Inputs) -> Decision:
    """The route, the worker, the codec. ``inputs.ask.routes`` are not empty, and each can be served by some node."""
    inputs = inputs.at(_prefill_node(inputs))
    ask = inputs.ask
    possible = {route: ways for route in ask.routes if (ways := plans(inputs, route))}
    best = {route: _best(ask, ways) for route, ways in possible.items()}
    known = {route: plan.predicted for route, plan in best.items() if plan.predicted}
    plan, reason = _pick(inputs, list(best.values()))
    others = [other for ways in possible.values() for other in ways if other.worker != plan.worker]
    patience_ns = _patience_ns(ask, plan, others)
    return Decision(plan.route, plan.worker, plan.codec, reason, known, patience_ns, inputs.vllm.name)


def _prefill_node(inputs: Inputs) -> str:
    """The prefill node by which the routes through vLLM are best, or the preferred one among those about equal that
    have not much more to do.
    """
    if not inputs.others:
        return inputs.vllm.name
    ranks = {node.name: _rank_at(inputs.at(node.name)) for node in inputs.prefill_nodes}
    least = min(ranks.values())
    good = [
        node
        for node in inputs.prefill_nodes
        if ranks[node.name] <= least * (_TRY_WITHIN if _is_little_known(node) else 1 + _AS_GOOD)
    ]
    least_ns, fewest = min(node.backlog_ns for node in good), min(node.sequences for node in good)
    for node in good:
        # At most one prefill like this one more stands before it.
        own_ns = node.prefill.at(inputs.ask.prompt_tokens - node.cached_tokens, 1) if node.prefill else 0
        if node.backlog_ns <= least_ns + own_ns and node.sequences <= fewest + _MORE_SEQUENCES:
            return node.name
    return min(good, key=lambda node: (node.backlog_ns, node.sequences)).name


def _rank_at(inputs: Inputs) -> float:
    """What the policy has of the best route through the first prefill node; infinite where nothing is known."""
    ask = inputs.ask
    through = [plan for route in ask.routes if route != "cpu" for plan in plans(inputs, route)]
    return min((_rank(ask, plan)[0] for plan in through), default=math.inf)


def _is_little_known(node: VllmFacts) -> bool:
    return node.prefill is None or node.prefill.samples < _TRIES or node.prefill.basis == ANOTHER_NODE


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
    load = load_of(inputs, there)
    if load is None or there.queue_ns:
        return first
    at_vllm = round(vllm.sequences / ask.choices)
    return by_route[mixing.place(load, at_vllm, round(in_flight / ask.choices) - at_vllm, ask.arriving, by_route)]


def _by_e2e(ask: Ask) -> bool:
    return ask.policy == "min_e2e" or (ask.policy == "max_goodput" and not (ask.slo_ttft_ns or ask.slo_tpot_ns))


def _is_worth_a_try(ask: Ask, plan: Plan, first: Plan) -> bool:
    if plan.predicted is None:
        return True
    return plan.predicted.samples < _TRIES and _rank(ask, plan)[0] <= _TRY_WITHIN * _rank(ask, first)[0]


def _rank(ask: Ask, plan: Plan) -> tuple[float, float]:
    """What the policy has least of; then what decides between equals. ``plan`` is predicted."""
    predicted = plan.predicted
    if predicted is None:
        return math.inf, math.inf
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


def _patience_ns(ask: Ask, plan: Plan, others: list[Plan]) -> int | None:
    """How long waiting for the plan's worker may take before another node would have been sooner."""
    known = [other.predicted.e2e_ns for other in others if other.predicted]
    if ask.reason == "forced" or ask.policy == "round_robin" or plan.predicted is None or not known:
        return None
    return max(0, min(known) - (plan.predicted.e2e_ns - plan.queue_ns))


def alternatives(decision: Decision) -> list[Route]:
    """The other routes that were predicted, the one that was thought soonest first."""
    others = [route for route in ROUTES if route in decision.predicted and route != decision.route]
    return sorted(others, key=lambda route: decision.predicted[route].e2e_ns)
