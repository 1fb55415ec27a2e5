"""What each way to serve a request would take, from what is known and nothing else."""

from __future__ import annotations

from typing import NamedTuple

from proxy import mixing
from proxy.costs import Cost
from proxy.facts import Ask, CodecFacts, Inputs, Prediction, WorkerFacts
from proxy.router import Route

# A codec that was never used is tried where waiting for KV takes such a share of the prefill's time.
_TRY_CODEC_FROM = 0.2
# Fewer tokens than this a worker computes before vLLM's first frame has arrived, where nothing is known.
ALWAYS_LOCAL_TOKENS = 32


class Plan(NamedTuple):
    """One way to serve a request; ``predicted`` is None where something about it is not known.

    Those through vLLM are through the first of the prefill nodes.
    """

    route: Route
    worker: str | None
    codec: str | None
    predicted: Prediction | None
    queue_ns: int = 0
    load: float = 0.0


def plans(inputs: Inputs, route: Route) -> list[Plan]:
    """All ways to take ``route``, in the order in which workers are preferred."""
    if route == "gpu":
        return [Plan("gpu", None, None, _by_gpu(inputs))]
    if route == "cpu":
        return [_by_cpu(inputs, worker) for worker in inputs.workers]
    return [_by_split(inputs, worker) for worker in inputs.workers if worker.codecs]


def load_of(inputs: Inputs, plan: Plan) -> mixing.Load | None:
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
    return float(any(node.sequences or node.backlog_ns for node in inputs.prefill_nodes))


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
