"""How many of the requests in flight had better decode at vLLM, and how many at the workers.

A request that only looks for its own shortest way makes the others pay: it lengthens every step of those beside it, and
where both engines compute on the same cores, each of them slows the other down. Nor can requests leave that state one
by one, for the first to move gains nothing (Pigou; Wardrop, "Some theoretical aspects of road traffic research", 1952).
So all in flight are thought of as being like the one to be placed, each followed by another like it, and the mix is
looked for in which they take least on average, which by Little's law is the one with the most requests in a second.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import product
from typing import NamedTuple

from proxy.costs import Cost
from proxy.router import Route

# No more mixes than this are looked at.
_MAX_MIXES = 32
# A mix that takes longer by this share is as good.
_AS_GOOD = 0.10


class Load(NamedTuple):
    """What each of the requests asks of the engines.

    Of vLLM's prefill ``prefill_ns`` is work, which others wait for, and ``latency_ns`` is not; ``local_ns`` and
    ``local_latency_ns`` are a worker's for the same prompt, ``exposed_ns`` what shows of a transfer. All but the last
    are of an engine that has its machine for itself. ``steps`` follow, by the costs ``vllm`` and ``worker``, each over
    ``sequences`` with ``context_tokens``. The requests may be on so many ``workers``.
    """

    prefill_ns: int
    latency_ns: int
    prefill_crowding: float
    local_ns: int
    local_latency_ns: int
    exposed_ns: int
    steps: int
    sequences: int
    context_tokens: int
    vllm: Cost
    worker: Cost
    workers: int


def place(load: Load, at_vllm: int, at_workers: int, arriving: int, routes: Collection[Route]) -> Route:
    """Which of ``routes`` one more request takes where so many are at either engine, and so many others ``arriving``.

    It goes where the best mix lacks most. If all that come could go one way, and that is as good, they do: on the way
    from one mix to another, requests take longer than in either.
    """
    coming = arriving + 1
    requests = at_vllm + at_workers + coming
    ways: list[Route] = [route for route in routes if route != "gpu"]
    if not ways:
        return "gpu"

    def total_ns(mix: tuple[int, Route]) -> float:
        way = _with_split if mix[1] == "split" else _with_local
        return way(load, mix[0], requests - mix[0])

    stride = -(-requests // _MAX_MIXES)
    counts = [*range(0, requests, stride), requests] if "gpu" in routes else [0]
    near_counts = (at_vllm, at_vllm + coming) if "gpu" in routes else (at_vllm,)
    best = min(product(counts, ways), key=total_ns)
    near = min(product(near_counts, ways), key=total_ns)
    wanted = near if total_ns(near) <= (1 + _AS_GOOD) * total_ns(best) else best
    missing_at_workers = requests - wanted[0] - at_workers
    return "gpu" if wanted[0] - at_vllm > missing_at_workers and "gpu" in routes else wanted[1]


def _with_split(load: Load, at_vllm: int, split: int) -> float:
    """Nanoseconds that all of them take together; the others' KV comes from vLLM."""
    if not split:
        return _at_vllm_ns(load, at_vllm, at_vllm, alone=True)
    decode_ns = load.steps * _step_ns(load, load.worker, split / load.workers)
    # They prefill one after the other. Where vLLM does nothing else, half of them stand before a request, and the other
    # half slows its decoding.
    queued_ns = load.prefill_ns * (split + 1) / 2
    if at_vllm:
        prefill_ns = (1 + load.prefill_crowding) * (load.prefill_ns * at_vllm + queued_ns)
        slowed_ns = load.worker.crowding * decode_ns
    else:
        prefill_ns = queued_ns
        slowed_ns = load.worker.crowding * min(decode_ns, queued_ns - load.prefill_ns)
    split_ns = load.latency_ns + prefill_ns + load.exposed_ns + decode_ns + slowed_ns
    return _at_vllm_ns(load, at_vllm, at_vllm + split, alone=False) + split * split_ns


def _with_local(load: Load, at_vllm: int, local: int) -> float:
    """The same where workers compute prompts themselves, each between the steps of all that are there."""
    if not local:
        return _at_vllm_ns(load, at_vllm, at_vllm, alone=True)
    each = local / load.workers
    work_ns = load.steps * _step_ns(load, load.worker, each) + load.local_ns * max(1.0, each)
    local_ns = load.local_latency_ns + (1 + load.worker.crowding * (at_vllm > 0)) * work_ns
    return _at_vllm_ns(load, at_vllm, at_vllm, alone=False) + local * local_ns


def _at_vllm_ns(load: Load, decoding: int, prefills: int, *, alone: bool) -> float:
    """What ``decoding`` requests take together from prompt to end, while vLLM computes ``prefills`` prompts.

    ``alone``: no worker is busy.
    """
    crowd = 0 if alone else 1
    prefill_ns = (1 + crowd * load.prefill_crowding) * load.prefill_ns * prefills
    steps_ns = (1 + crowd * load.vllm.crowding) * load.steps * _step_ns(load, load.vllm, decoding)
    return decoding * (load.latency_ns + prefill_ns + steps_ns)


def _step_ns(load: Load, step: Cost, requests: float) -> int:
    requests = max(1.0, requests)
    return step.at(1, requests * load.sequences, requests * load.context_tokens)
