"""What the proxy has learned from requests that have ended: how long each part of the next one will take."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec
import structlog

from proxy.costs import Average, Cost, Learner
from proxy.facts import ANOTHER_NODE, Inputs, WorkerFacts
from proxy.ledger import Entry
from proxy.measured import Measured, Speed
from transfer.messages import Status

# Workers that are gone are forgotten when there are so many names.
MAX_NAMES = 128
# An answer of which nothing is known.
ANSWER_TOKENS = 128
_NS_PER_S = 1_000_000_000
# A calibration is worth as much as two requests, so that the route is not tried for the sake of its numbers.
_CALIBRATED = 2

log = structlog.get_logger()

N = TypeVar("N")


class AnswerLengths:
    """How long answers get under limits of about the same size (powers of two), or without one."""

    def __init__(self) -> None:
        self._by_limit: dict[int, Average] = {}

    def observe(self, limit: int | None, tokens: int) -> None:
        """An answer that might have had ``limit`` tokens had ``tokens``."""
        self._by_limit.setdefault(_size(limit), Average()).observe(tokens)

    def expected(self, limit: int | None, most: int) -> int:
        """What to expect, at most ``most``."""
        known = self._by_limit.get(_size(limit))
        tokens = known.value if known and known.value is not None else (limit or ANSWER_TOKENS)
        return max(1, min(round(tokens), most))


class CodecEstimates:
    """One codec on the link: how much of a transfer shows, what it saves and how fast both ends are."""

    def __init__(self) -> None:
        # By (tokens sent, transfers).
        self.exposed = Learner(2)
        self.ratio, self.encode_bytes_per_s, self.decode_bytes_per_s = Average(), Average(), Average()

    def start(self, speed: Speed) -> None:
        """Begin with what was measured."""
        self.ratio.observe(speed.ratio)
        self.encode_bytes_per_s.observe(speed.encode_bytes_per_s)
        self.decode_bytes_per_s.observe(speed.decode_bytes_per_s)
        self.exposed.start(speed.exposed)

    def learn(self, entry: Entry) -> None:
        """From a request whose KV travelled."""
        self.exposed.observe(entry.transfer_exposed_ns, entry.prompt_tokens - entry.kv_reused_tokens, 1)
        self.ratio.observe(entry.kv_wire_bytes / entry.kv_raw_bytes)
        for average, took_ns in (
            (self.encode_bytes_per_s, entry.encode_ns),
            (self.decode_bytes_per_s, entry.decode_frame_ns),
        ):
            if took_ns:
                average.observe(entry.kv_raw_bytes / took_ns * _NS_PER_S)


class VllmEstimates:
    """One prefill node: its prefill by (new tokens, requests), and its steps by (steps, sequences, context tokens)."""

    def __init__(self, measured: Measured) -> None:
        self.prefill = Learner(2)
        self.step = Learner(3)
        self.prefill.start(measured.vllm_prefill)
        self.step.start(measured.vllm_step)


class WorkerEstimates:
    """One decode worker: its own prefill by (new tokens, requests, new tokens x sequences beside), and its steps by
    (steps, sequences, context tokens).
    """

    def __init__(self, measured: Measured) -> None:
        self.prefill = Learner(3)
        self.step = Learner(3)
        self.prefill.start(measured.worker_prefill)
        self.step.start(measured.worker_step)
        # How long a request holds its place.
        self.service_ns = Average()
        self._status: Status | None = None

    def learn_status(self, status: Status) -> None:
        """From what the worker says of its steps. Where it speculates, a step is not a token: only requests tell."""
        if status is not self._status and status.step_ns and status.step_sequences and not status.drafted_tokens:
            self.step.observe(status.step_ns, 1, status.step_sequences, status.step_context_tokens)
        self._status = status


class Estimates:
    """Everything that is learned. :meth:`learn` needs nothing but an entry, so that a stored ledger can be read in."""

    def __init__(self) -> None:
        self.answers = AnswerLengths()
        self.codecs: dict[str, CodecEstimates] = {}
        self._vllms: OrderedDict[str, VllmEstimates] = OrderedDict()
        self._workers: OrderedDict[str, WorkerEstimates] = OrderedDict()
        # The pace of late transfers; the best of them is what the link can do, for most wait for prefill.
        self._paces: deque[float] = deque(maxlen=32)
        self._measured = Measured()

    def start(self, measured: Measured) -> None:
        """Begin with what was measured before anything has been learned."""
        self._measured = measured
        if measured.link_bytes_per_s:
            self._paces.append(measured.link_bytes_per_s)
        for name, speed in measured.codecs.items():
            self.codecs.setdefault(name, CodecEstimates()).start(speed)

    @property
    def link_bytes_per_s(self) -> float | None:
        """The link's goodput, as far as transfers have asked for it."""
        return max(self._paces, default=None)

    def vllm(self, name: str) -> VllmEstimates:
        """What is known of the prefill node ``name``."""
        return _known(self._vllms, name, lambda: VllmEstimates(self._measured))

    def worker(self, name: str) -> WorkerEstimates:
        """What is known of the worker ``name``."""
        return _known(self._workers, name, lambda: WorkerEstimates(self._measured))

    def vllm_prefill(self, name: str) -> Cost | None:
        """The prefill node's prefill; another's where this one has made none yet."""
        return self.vllm(name).prefill.cost or _of_another(each.prefill for each in self._vllms.values())

    def vllm_step(self, name: str) -> Cost | None:
        """The prefill node's decode step; another's where this one has made none yet."""
        return self.vllm(name).step.cost or _of_another(each.step for each in self._vllms.values())

    def worker_prefill(self, name: str, status: Status | None) -> Cost | None:
        """The worker's own prefill, as requests took it, or else as it has measured it itself."""
        learned = self.worker(name).prefill.cost
        if learned is None and status is not None and status.prefill_tokens_per_s > 0:
            return Cost((float(f"{_NS_PER_S / status.prefill_tokens_per_s:.4g}"), 0, 0), _CALIBRATED, "calibrated")
        return learned

    def worker_step(self, name: str, status: Status | None, *, alone: bool) -> Cost | None:
        """The worker's decode step; another's where this one has made none yet.

        It is learned from the ``status`` as well, if that is of a time for which no other engine was busy.
        """
        own = self.worker(name)
        if status is not None and alone:
            own.learn_status(status)
        if own.step.cost is not None:
            return own.step.cost
        return _of_another((other.step for other in self._workers.values()), "another worker")

    def learn(self, entry: Entry) -> None:
        """Take in a request that has ended well, at the first attempt."""
        inputs = entry.decision and entry.decision.at(entry.prefill_node)
        if entry.status != "ok" or entry.failed_over or inputs is None or not entry.completion_tokens:
            return
        if entry.shadow_of is None:
            limit = entry.max_tokens
            self.answers.observe(limit, entry.completion_tokens // inputs.ask.choices)
        match entry.route:
            case "gpu":
                self._learn_vllm_prefill(entry, inputs)
                self._learn_vllm_step(entry, inputs)
            case "split":
                self._learn_vllm_prefill(entry, inputs)
                self._learn_worker_step(entry, inputs, 2)
                if entry.codec and entry.kv_raw_bytes:
                    self.codecs.setdefault(entry.codec, CodecEstimates()).learn(entry)
                    if entry.wire_ns:
                        self._paces.append(entry.kv_wire_bytes / entry.wire_ns * _NS_PER_S)
            case "cpu":
                self._learn_worker_prefill(entry, inputs)
                self._learn_worker_step(entry, inputs, 1)

    def recall(self, stored: Iterable[str]) -> None:
        """Learn from entries as JSON, in the order in which they were closed; those of another make are passed over."""
        for text in stored:
            try:
                self.learn(msgspec.json.decode(text, type=Entry))
            except msgspec.DecodeError as error:
                log.debug("a stored entry does not parse", error=str(error))

    def view(self) -> dict[str, Any]:
        """What is known, for people."""
        speeds = {
            name: {
                "ratio": codec.ratio.value,
                "encode_bytes_per_s": codec.encode_bytes_per_s.value,
                "decode_bytes_per_s": codec.decode_bytes_per_s.value,
                "exposed": codec.exposed.cost,
            }
            for name, codec in self.codecs.items()
        }
        workers = {name: {"prefill": each.prefill.cost, "step": each.step.cost} for name, each in self._workers.items()}
        vllms = {name: {"prefill": each.prefill.cost, "step": each.step.cost} for name, each in self._vllms.items()}
        return {
            # Of the one that was looked at last.
            "vllm": next(reversed(vllms.values()), {"prefill": None, "step": None}),
            "prefill_nodes": vllms,
            "workers": workers,
            "codecs": speeds,
            "link_bytes_per_s": self.link_bytes_per_s,
        }

    def _learn_vllm_prefill(self, entry: Entry, inputs: Inputs) -> None:
        new_tokens = max(1, entry.prompt_tokens - entry.prefill_cached_tokens)
        took_ns, tokens = _prefill(entry, entry.prefill_ns, new_tokens, inputs.vllm.backlog_ns)
        vllm = self.vllm(entry.prefill_node or "")
        vllm.prefill.observe(took_ns, tokens, 1, crowd=_crowd(entry, "prefill"))

    def _learn_vllm_step(self, entry: Entry, inputs: Inputs) -> None:
        facts, vllm = inputs.vllm, self.vllm(entry.prefill_node or "")
        _learn_step(vllm.step, vllm.prefill.cost, entry, inputs, 1, facts.sequences, facts.context_tokens)

    def _learn_worker_prefill(self, entry: Entry, inputs: Inputs) -> None:
        facts = _of(inputs, entry.worker)
        if entry.local_prefill_ns and entry.worker and facts:
            new_tokens = max(1, entry.prompt_tokens - entry.kv_reused_tokens)
            took_ns, tokens = _prefill(entry, entry.local_prefill_ns, new_tokens, facts.backlog_ns)
            beside = entry.beside.get("prefill")
            sequences = beside.sequences if beside else facts.sequences
            prefill = self.worker(entry.worker).prefill
            prefill.observe(took_ns, tokens, 1, tokens * sequences, crowd=_crowd(entry, "prefill"))

    def _learn_worker_step(self, entry: Entry, inputs: Inputs, made_before: int) -> None:
        facts = _of(inputs, entry.worker)
        if entry.worker and facts:
            worker = self.worker(entry.worker)
            worker.service_ns.observe(entry.prefill_ns + entry.decode_ns)
            prefill = worker.prefill.cost
            _learn_step(worker.step, prefill, entry, inputs, made_before, facts.sequences, facts.context_tokens)


def _learn_step(
    step: Learner,
    prefill: Cost | None,
    entry: Entry,
    inputs: Inputs,
    made_before: int,
    sequences: float,
    context_tokens: float,
) -> None:
    """From ``entry.decode_ns``, which begins when ``made_before`` tokens of each choice are known.

    What others' prompts took of that time is not the steps' own, but only an estimate. Entries of an older make know of
    the ``sequences`` that were there at the decision.
    """
    choices = inputs.ask.choices
    made = entry.completion_tokens // choices
    if made <= made_before or not entry.decode_ns:
        return
    own_ns, beside = entry.decode_ns, entry.beside.get("decode")
    if beside:
        crowd, sequences, context_tokens = beside.crowd, beside.sequences, beside.context_tokens
        if prefill:
            others_ns = round(prefill.ns[0] * (1 + prefill.crowding * crowd) * beside.prefilled_tokens)
            own_ns = max(own_ns - others_ns, own_ns // 2)
    else:
        crowd, sequences = 0.0, sequences + choices
        context_tokens += entry.prompt_tokens + choices * made // 2
    step.observe(own_ns // (made - made_before), 1, sequences, context_tokens, crowd=crowd)


def _prefill(entry: Entry, took_ns: int, new_tokens: int, backlog_ns: int) -> tuple[int, int]:
    """What a prefill took, and the tokens of all prompts that were computed in that time.

    In entries of an older make they are its own, and what stood before it is taken away, which is only an estimate.
    """
    beside = entry.beside.get("prefill")
    if beside:
        return took_ns, max(new_tokens, beside.prefilled_tokens)
    return max(took_ns - backlog_ns, took_ns // 2), new_tokens


def _crowd(entry: Entry, stage: str) -> float:
    """The share of a stage's time for which the other engine was busy; 0 in entries of an older make."""
    beside = entry.beside.get(stage)
    return beside.crowd if beside else 0.0


def _known(by_name: OrderedDict[str, N], name: str, kind: Callable[[], N]) -> N:
    """What ``by_name`` has of a node, made anew where it is not known; the ones not asked for longest are forgotten."""
    if name not in by_name:
        by_name[name] = kind()
    by_name.move_to_end(name)
    if len(by_name) > MAX_NAMES:
        by_name.popitem(last=False)
    return by_name[name]


def _of_another(learners: Iterable[Learner], basis: str = ANOTHER_NODE) -> Cost | None:
    """The last one that has learned anything."""
    found = next((learner.cost for learner in reversed(list(learners)) if learner.cost), None)
    return msgspec.structs.replace(found, basis=basis) if found else None


def _of(inputs: Inputs, worker: str | None) -> WorkerFacts | None:
    return next((each for each in inputs.workers if each.name == worker), None)


def _size(limit: int | None) -> int:
    return limit.bit_length() if limit else 0
