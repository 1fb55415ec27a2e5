"""What every request cost, stage by stage."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from proxy.costs import Estimate
from proxy.facts import Inputs, Prediction
from proxy.load import Beside, Occupancy, Watch
from proxy.router import Reason, Route
from proxy.store import PAGE_ROWS, Row, Store, Wanted
from proxy.totals import Totals
from proxy.witness import Witness
from transfer.stages import DecodeReport, Meter

if TYPE_CHECKING:
    from proxy.tracing import Trace


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One try to serve a request: where, how many tokens of the answer it made, and the error code that ended it."""

    route: Route
    worker: str | None
    codec: str | None
    completion_tokens: int
    error: str | None
    prefill_node: str | None = None


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One closed request. Durations in ns on the proxy's clock or, from ``gather_ns`` to ``decode_ns``, on the node's.

    ``prefill_ns`` is vLLM's answer for ``split``, the worker's own prefill for ``cpu`` and the time to the first token
    for ``gpu``. ``specialization_gain_ns`` is what prefill on the other node saved; only ``split`` has one.
    ``status`` is ``ok``, ``cancelled`` or an error code. ``failed_over`` is the code with which the first node failed
    the request; ``route``, ``worker``, ``codec`` and ``prefill_node``, whose vLLM was asked, are then of
    the last of ``attempts``.

    ``max_tokens`` is the client's own limit for each answer. ``cached_tokens`` of the prompt were computed before,
    ``prefill_cached_tokens`` of them by vLLM; ``local_prefill_ns`` is the worker's own prefill on any route. Of
    ``transfer_exposed_ns``, ``landing_tail_ns`` came after the last frame with data. Of the ``kv_reused_tokens``,
    ``kv_restored_tokens`` came from below the worker's cells in ``restore_ns``. Speculation guessed ``drafted_tokens``,
    of which ``accepted_tokens`` were right.
    ``predicted`` is what the first decision expected of each open route, and ``decision`` all that it was made from
    (``facts.py``; arrays in the order of the fields there). ``ttft_error`` and ``e2e_error`` are how far that was off
    for the route taken and an answer of the length that it had, as a share of what it took (0.1: a tenth too much).
    ``beside`` is what else went on at the node that did a stage, ``prefill`` and ``decode``, as far as the proxy knows.
    A request that was run again to test the predictions has a ``shadow_of``, the first one's id. ``regret_ns`` is how
    much sooner the best route that is known of for this very request would have ended it.

    ``seq`` counts entries as they are closed; ``closed_at`` is the proxy's wall clock then, for people. ``parity_kl``
    is what the parity guard found afterwards, if it looked (``parity.py``).
    """

    request_id: str
    model: str
    route: Route | None
    reason: str | None
    worker: str | None
    codec: str | None
    prompt_tokens: int
    completion_tokens: int
    queue_ns: int
    tokenize_ns: int
    route_ns: int
    reserve_ns: int
    prefill_ns: int
    gather_ns: int
    encode_ns: int
    d2h_ns: int
    wire_ns: int
    decode_frame_ns: int
    inject_ns: int
    first_decode_ns: int
    decode_ns: int
    kv_raw_bytes: int
    kv_wire_bytes: int
    kv_reused_tokens: int
    transfer_exposed_ns: int
    ttft_ns: int | None
    total_ns: int
    prefill_alternative_ns: int | None
    prefill_alternative_basis: str | None
    specialization_gain_ns: int | None
    failed_over: str | None
    attempts: list[Attempt]
    status: str
    seq: int = 0
    closed_at: str = ""
    parity_kl: float | None = None
    max_tokens: int | None = None
    cached_tokens: int = 0
    prefill_cached_tokens: int = 0
    local_prefill_ns: int = 0
    landing_tail_ns: int = 0
    worker_queue_ns: int = 0
    kv_restored_tokens: int = 0
    restore_ns: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    predicted: dict[Route, Prediction] = {}
    decision: Inputs | None = None
    shadow_of: str | None = None
    regret_ns: int | None = None
    ttft_error: float | None = None
    e2e_error: float | None = None
    beside: dict[str, Beside] = {}
    prefill_node: str | None = None

    @property
    def reuse_saved_ns(self) -> int | None:
        """What the worker's own prefill of the reused tokens would have taken, less bringing back their KV."""
        if self.prefill_alternative_ns is None or not self.prompt_tokens:
            return None
        return self.prefill_alternative_ns * self.kv_reused_tokens // self.prompt_tokens - self.restore_ns

    @property
    def served_ns(self) -> int:
        """From the decision to the end."""
        return self.total_ns - self.queue_ns - self.tokenize_ns - self.route_ns

    def server_timing(self) -> str:
        """The stages as a ``Server-Timing`` header, in milliseconds (https://www.w3.org/TR/server-timing/)."""
        stages = ("queue", "tokenize", "route", "reserve", "prefill", "transfer_exposed", "decode", "total")
        return ", ".join(f"{stage};dur={getattr(self, f'{stage}_ns') / 1e6:.3f}" for stage in stages)

    def timings(self) -> dict[str, float]:
        """The two phases as llama-server says them, in milliseconds (``timings`` in its README)."""
        prompt_n = max(1, self.prompt_tokens - self.kv_reused_tokens)
        prompt_ms, predicted_ms = self.prefill_ns / 1e6, self.decode_ns / 1e6
        return {
            "cache_n": self.kv_reused_tokens,
            "prompt_n": prompt_n,
            "prompt_ms": prompt_ms,
            "prompt_per_token_ms": prompt_ms / prompt_n,
            "prompt_per_second": 1e3 * prompt_n / prompt_ms if prompt_ms else 0.0,
            "predicted_n": self.completion_tokens,
            "predicted_ms": predicted_ms,
            "predicted_per_token_ms": predicted_ms / max(1, self.completion_tokens),
            "predicted_per_second": 1e3 * self.completion_tokens / predicted_ms if predicted_ms else 0.0,
        }


class Account:
    """An open entry: filled on the request's way, closed once."""

    def __init__(self, request_id: str, model: str) -> None:
        self.request_id = request_id
        self.model = model
        self.meter = Meter()
        self.route: Route | None = None
        self.reason: Reason | None = None
        self.worker: str | None = None
        self.codec: str | None = None
        self.prefill_node: str | None = None
        # Those that failed.
        self.attempts: list[Attempt] = []
        self.prompt: list[int] = []
        # Known from attempts that failed, and from the one that goes on.
        self.carried_tokens = 0
        self.route_tokens = 0
        self.cached_tokens = 0
        self.prefill_cached_tokens = 0
        # The first decision; what is expected of an attempt that goes on says nothing of the whole request.
        self.predicted: dict[Route, Prediction] = {}
        self.decision: Inputs | None = None
        self.max_tokens: int | None = None
        self.shadow_of: str | None = None
        self.alternative: Estimate | None = None
        self.report: DecodeReport | None = None
        self.witness = Witness()
        self.trace: Trace | None = None
        self._watches: dict[str, Watch] = {}
        self._began_ns = time.monotonic_ns()
        self._first_text_ns: int | None = None
        self._last_text_ns = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt; 0 until they are known."""
        return len(self.prompt)

    @property
    def completion_tokens(self) -> int:
        """Tokens of the answer so far."""
        return self.carried_tokens + self.route_tokens

    def failed(self, error: str, known_tokens: int) -> None:
        """An attempt has ended with ``error``; the next one starts after ``known_tokens`` of the answer."""
        self._end_attempt(error, known_tokens - self.carried_tokens)
        self.carried_tokens, self.route_tokens, self.report = known_tokens, 0, None
        self.worker = self.codec = self.prefill_node = None

    def turn_local(self, reason: Reason, error: str | None = None) -> None:
        """The worker computes the prompt in the place reserved for KV; because of ``error`` if there is one."""
        worker = self.worker
        if error is not None:
            self.failed(error, self.carried_tokens)
        self.route, self.reason, self.worker, self.codec, self.prefill_node = "cpu", reason, worker, None, None

    def _end_attempt(self, error: str | None, completion_tokens: int) -> None:
        if self.route is not None:
            self.attempts.append(
                Attempt(
                    route=self.route,
                    worker=self.worker,
                    codec=self.codec,
                    completion_tokens=completion_tokens,
                    error=error,
                    prefill_node=self.prefill_node,
                )
            )

    def watched(self, stage: Literal["prefill", "decode"], own: Occupancy, other: Occupancy) -> Watch:
        """The body is a ``stage`` at ``own``: note what else goes on there, and at the ``other`` engine."""
        self._watches[stage] = watch = Watch(own, other)
        return watch

    def _beside(self) -> dict[str, Beside]:
        """What is known once both stages are over."""
        if len(self._watches) < 2:
            return {}
        prefill, decode = self._watches["prefill"], self._watches["decode"]
        together_ns = prefill.together_ns
        return {"prefill": prefill.beside(0, together_ns), "decode": decode.beside(together_ns, 0)}

    def saw_text(self) -> int | None:
        """Note that text goes out to the client; returns the ns since the text before it, None for the first."""
        now_ns = time.monotonic_ns()
        gap_ns = None if self._first_text_ns is None else now_ns - self._last_text_ns
        self._first_text_ns = self._first_text_ns or now_ns
        self._last_text_ns = now_ns
        return gap_ns

    def close(self, status: str) -> Entry:
        """The entry as it stands now."""
        now_ns = time.monotonic_ns()
        ns = self.meter.ns
        failed_over = self.attempts[0].error if self.attempts else None
        self._end_attempt(None if status == "ok" else status, self.route_tokens)
        report = self.report or DecodeReport(prompt_tokens=self.prompt_tokens, completion_tokens=0)
        prefill_ns = report.local_prefill_ns if self.route == "cpu" else ns["prefill"]
        gain_ns = None
        if self.route == "split" and self.report and self.alternative:
            gain_ns = self.alternative.ns - (prefill_ns + report.transfer_exposed_ns)
        ttft_error, e2e_error = self._errors(now_ns) if status == "ok" and not failed_over else (None, None)
        return Entry(
            request_id=self.request_id,
            model=self.model,
            route=self.route,
            reason=self.reason,
            worker=self.worker,
            codec=self.codec,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            queue_ns=ns["queue"],
            tokenize_ns=ns["tokenize"],
            route_ns=ns["route"],
            reserve_ns=ns["reserve"],
            prefill_ns=prefill_ns,
            gather_ns=report.gather_ns,
            encode_ns=report.encode_ns,
            d2h_ns=report.d2h_ns,
            wire_ns=report.wire_ns,
            decode_frame_ns=report.decode_frame_ns,
            inject_ns=report.inject_ns,
            first_decode_ns=report.first_decode_ns,
            decode_ns=report.decode_ns or ns["decode"],
            kv_raw_bytes=report.kv_raw_bytes,
            kv_wire_bytes=report.kv_wire_bytes,
            kv_reused_tokens=report.kv_reused_tokens,
            transfer_exposed_ns=report.transfer_exposed_ns,
            ttft_ns=None if self._first_text_ns is None else self._first_text_ns - self._began_ns,
            total_ns=now_ns - self._began_ns,
            prefill_alternative_ns=self.alternative.ns if self.alternative else None,
            prefill_alternative_basis=self.alternative.basis if self.alternative else None,
            specialization_gain_ns=gain_ns,
            failed_over=failed_over,
            attempts=self.attempts,
            status=status,
            max_tokens=self.max_tokens,
            cached_tokens=self.cached_tokens,
            prefill_cached_tokens=self.prefill_cached_tokens,
            local_prefill_ns=report.local_prefill_ns,
            landing_tail_ns=report.landing_tail_ns,
            worker_queue_ns=report.worker_queue_ns,
            kv_restored_tokens=report.restored_tokens,
            restore_ns=report.restore_ns,
            preemptions=report.preemptions,
            drafted_tokens=report.drafted_tokens,
            accepted_tokens=report.accepted_tokens,
            predicted=dict(self.predicted),
            decision=self.decision,
            shadow_of=self.shadow_of,
            ttft_error=ttft_error,
            beside=self._beside(),
            e2e_error=e2e_error,
            prefill_node=self.prefill_node,
        )

    def _errors(self, now_ns: int) -> tuple[float | None, float | None]:
        """How far predictions were off: of the first token, and of as many tokens as there were."""
        predicted = self.predicted.get(self.route) if self.route else None
        if predicted is None or self.decision is None or self._first_text_ns is None:
            return None, None
        ns = self.meter.ns
        decided_ns = self._began_ns + ns["queue"] + ns["tokenize"] + ns["route"]
        steps = max(0, self.completion_tokens // self.decision.ask.choices - 1)
        return (
            round(predicted.ttft_ns / max(1, self._first_text_ns - decided_ns) - 1, 4),
            round((predicted.ttft_ns + steps * predicted.tpot_ns) / max(1, now_ns - decided_ns) - 1, 4),
        )


class Ledger:
    """The newest ``size`` entries in memory and, with a ``store``, more of them in its file; ``totals`` over all."""

    def __init__(self, size: int, store: Store | None = None) -> None:
        self._entries: deque[Entry] = deque(maxlen=size)
        self._store = store
        self._last_seq = store.last_seq if store else 0
        self.totals = Totals(store.totals if store else (), self._last_seq)

    def add(self, entry: Entry) -> Entry:
        """Number ``entry`` and keep it, forgetting the oldest one if need be; returns it as it was kept."""
        self._last_seq += 1
        closed_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = msgspec.structs.replace(entry, seq=self._last_seq, closed_at=closed_at)
        self._entries.append(entry)
        self.totals.add(entry)
        if self._store:
            fields = (entry.route, entry.worker, entry.codec, entry.status)
            self._store.put(Row(entry.seq, entry.request_id, closed_at, *fields, _json(entry)))
        return entry

    def amend(self, seq: int, **changes: Any) -> None:
        """Change fields of the entry ``seq``: what was found out after the request had been closed."""
        for place, entry in enumerate(self._entries):
            if entry.seq == seq:
                self._entries[place] = msgspec.structs.replace(entry, **changes)
        if self._store:
            self._store.amend(seq, changes)

    def last(self, count: int) -> list[Entry]:
        """The newest ``count`` entries in memory, newest last."""
        return list(self._entries)[-count:]

    def pages(self, wanted: Wanted, last: int) -> Iterator[list[str]]:
        """The newest ``last`` entries that are ``wanted``, as JSON, newest last, a page at a time.

        Call it where entries are added. What it returns may be read on any thread, which may have to wait for the file.
        """
        kept = list(self._entries)
        oldest = kept[0].seq if kept else None
        found = [entry for entry in kept if wanted.admits(entry)][-last:]
        store = self._store
        if oldest is not None and wanted.since >= oldest - 1:
            store = None
        return _pages(found, store, wanted, last - len(found), oldest)


def _pages(
    found: list[Entry], store: Store | None, wanted: Wanted, missing: int, before: int | None
) -> Iterator[list[str]]:
    if store and missing:
        yield from store.pages(wanted, missing, before)
    for start in range(0, len(found), PAGE_ROWS):
        yield [_json(entry) for entry in found[start : start + PAGE_ROWS]]


def _json(entry: Entry) -> str:
    return msgspec.json.encode(entry).decode()
