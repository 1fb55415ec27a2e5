"""What a decision is made from, and what it expects: structs that stand in the ledger, arrays in this order of fields.

New fields come last and have defaults, so that entries of an older make can be read.
"""

from __future__ import annotations

import msgspec

from proxy.costs import Cost
from proxy.router import Reason, Route
from transfer.config import PolicyName

# The basis of a cost that a node has not shown itself.
ANOTHER_NODE = "another node"


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """What is to be done. ``routes`` are open; with a ``reason`` it is known already why one is taken.

    ``answer_tokens`` is what each of ``choices`` is expected to have. Objectives are 0 where there are none. ``turn``
    counts round-robin. The request ``may_try`` what is not known. With ``worker_samples`` vLLM's first token is of no
    use. So many others are ``arriving``: here and not placed yet, or expected from what was lately.
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
    """A prefill node: ``prefill`` by (new tokens, requests), ``step`` by (steps, sequences, context tokens).

    ``backlog_ns`` of prefills stand before this one; ``sequences`` decode there or will, ``context_tokens`` in all.
    ``cached_tokens`` of the prompt are thought to be in vLLM's prefix cache.
    """

    prefill: Cost | None
    step: Cost | None
    backlog_ns: int
    sequences: int
    context_tokens: int
    cached_tokens: int
    name: str = ""


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
    """All that a decision is made from; ``vllm`` is the preferred prefill node, ``others`` follow as preferred."""

    ask: Ask
    vllm: VllmFacts
    workers: tuple[WorkerFacts, ...]
    others: tuple[VllmFacts, ...] = ()

    @property
    def prefill_nodes(self) -> tuple[VllmFacts, ...]:
        """All of them, the preferred one first."""
        return self.vllm, *self.others

    def at(self, name: str | None) -> Inputs:
        """The same with the prefill node ``name`` in front; as it is if that is none of them."""
        chosen = next((node for node in self.others if node.name == name), None)
        if chosen is None:
            return self
        rest = tuple(node for node in self.prefill_nodes if node is not chosen)
        return msgspec.structs.replace(self, vllm=chosen, others=rest)


class Prediction(msgspec.Struct, frozen=True):
    """What a route would take from the decision on: to the first token, for each one after it, and in all.

    ``samples`` is the least number of observations behind any part.
    """

    ttft_ns: int
    tpot_ns: int
    e2e_ns: int
    samples: int
