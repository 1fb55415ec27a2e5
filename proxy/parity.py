"""The parity guard: whether KV that came over the wire predicts what the worker's own would.

An answer that is fluent and wrong is the worst that a split can do: HTTP 200, and KV in the wrong order. Of a share of
the split requests the guard keeps the prompt and the likeliest tokens that the worker saw right after it
(``witness.py``). When nothing else is to do, the worker computes the same prompt itself, without reusing any KV, and
the two distributions are compared (``divergence.py``).

One position that differs may be chance, for fp16 attention and quantized weights amplify any rounding now and then; so
a codec is switched off for a worker when two of its last three comparisons were above the threshold. Every request is
looked at until ``FIRST_CHECKS`` comparisons have been made, and while the last one was bad. Where the codec is the one
that carries KV just as the cells hold it, no other can be better: then the worker gets no KV at all, and nothing that
it has kept of earlier KV is reused.

After a pause the prompt of a request that was served elsewhere is sent once more by the codec, for nobody, and compared
(``probation.py``). A bad comparison doubles the pause, enough good ones bring the codec back; what the worker has kept
until then stays unused.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog

from proxy.comparison import Top, own_prediction, prediction_by_wire
from proxy.decode_node import DecodeNode
from proxy.divergence import least_kl
from proxy.nodes import DecodePool
from proxy.prefill_pool import PrefillPool
from proxy.probation import Probations
from proxy.witness import Evidence
from transfer.errors import CapacityError, IsthmusError

FIRST_CHECKS = 4
MAX_WAITING = 8
MAX_TRIES = 3
# Nothing may have happened for so long before a comparison, and whatever happens ends it.
QUIET_S = 0.5
POLL_S = 0.05
# A shorter prompt shows little of what is wrong with KV.
MIN_TRIED_TOKENS = 16

log = structlog.get_logger()

V = TypeVar("V")


class Record:
    """What comparisons have shown of one codec's KV in one worker's cells."""

    def __init__(self) -> None:
        self.checks = 0
        self.recent: deque[float] = deque(maxlen=3)
        self.owed = 0.0

    def wants_more(self, share: float, max_kl: float) -> bool:
        """Whether the next request is to be looked at: every 1 / ``share``-th, and all of them where there is doubt."""
        if self.checks < FIRST_CHECKS or self.recent[-1] > max_kl:
            return True
        self.owed += share
        self.owed -= (due := self.owed >= 1)
        return due

    def learn(self, kl: float) -> None:
        """Take in a comparison."""
        self.checks += 1
        self.recent.append(kl)

    def is_bad(self, max_kl: float) -> bool:
        """Whether KV is not to come this way any more."""
        return sum(kl > max_kl for kl in self.recent) > 1


class Case:
    """A request, the ledger's entry ``seq``, that waits to be looked at."""

    def __init__(self, seq: int, evidence: Evidence) -> None:
        self.seq = seq
        self.evidence = evidence
        self.worker, self.codec, self.tokens = evidence.worker, evidence.codec, evidence.tokens
        self.tries = 0


class Trial:
    """The prompt of a request of ``tenant`` by which a codec that is off is to be tried again."""

    def __init__(self, worker: str, codec: str, tokens: list[int], tenant: str) -> None:
        self.worker, self.codec, self.tokens = worker, codec, tokens
        self.tenant = tenant
        self.tries = 0


class ParityGuard:
    """Compares a ``share`` of split requests, none if it is 0, when not ``busy``; over ``max_kl`` nats is too much.

    ``found`` hears of each comparison: the entry's number, the codec and the KL.
    """

    def __init__(
        self,
        prefill: PrefillPool,
        workers: DecodePool,
        share: float,
        max_kl: float,
        *,
        busy: Callable[[], bool],
        found: Callable[[int, str, float], None],
    ) -> None:
        self._prefill = prefill
        self._workers = workers
        self._share = share
        self._max_kl = max_kl
        self._is_busy = busy
        self._found = found
        self._records: dict[tuple[str, str], Record] = {}
        self._probations = Probations()
        self._waiting: deque[Case | Trial] = deque()
        self._news = asyncio.Event()
        self._quiet_since_ns = 0

    @property
    def alarms(self) -> list[str]:
        """What is switched off, and why; nothing if all is well."""
        return [
            f"{codec} to {node.name}: {reason}" for node in self._workers for codec, reason in node.distrusted.items()
        ]

    def wants(self, worker: str, codec: str) -> bool:
        """Whether the next request whose KV goes to ``worker`` by ``codec`` is to be looked at."""
        if not self._share or len(self._waiting) >= MAX_WAITING:
            return False
        record = self._records.setdefault((worker, codec), Record())
        return record.wants_more(self._share, self._max_kl)

    def keep(self, seq: int, evidence: Evidence) -> None:
        """Look at the request of ledger entry ``seq`` when there is time; the oldest gives way to it if need be."""
        self._waiting.append(Case(seq, evidence))
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popleft()
        self._news.set()

    def offer(self, tokens: list[int], tenant: str) -> None:
        """A request with this prompt has been served: it may be what a codec that is off is tried with."""
        if len(tokens) < MIN_TRIED_TOKENS or any(isinstance(each, Trial) for each in self._waiting):
            return
        due = self._probations.due(time.monotonic_ns())
        if due and len(self._waiting) < MAX_WAITING:
            self._waiting.append(Trial(*due, tokens, tenant))
            self._news.set()

    def probations(self) -> list[dict[str, Any]]:
        """What is switched off, and when it is tried again."""
        return self._probations.view(time.monotonic_ns())

    async def run(self) -> None:
        """Look at what was kept until cancelled."""
        while True:
            self._news.clear()
            if not self._waiting:
                await self._news.wait()
            await asyncio.sleep(POLL_S)
            case = self._waiting[0]
            node = self._workers.nodes.get(case.worker)
            if node is None or (case.codec in node.distrusted) != isinstance(case, Trial):
                self._waiting.remove(case)
                if isinstance(case, Trial):
                    # The worker is gone, or another one came in its place.
                    self._probations.forget(case.worker)
            elif self._is_quiet(node):
                await self._look_at(case, node)

    def _is_quiet(self, node: DecodeNode) -> bool:
        now_ns = time.monotonic_ns()
        status = node.status
        idle = node.takes_requests and status is not None and not status.reserved_sequences and not node.conversations
        if self._is_busy() or not idle:
            self._quiet_since_ns = now_ns
        return now_ns - self._quiet_since_ns >= QUIET_S * 1e9

    async def _look_at(self, case: Case | Trial, node: DecodeNode) -> None:
        case.tries += 1
        try:
            kl = await self._undisturbed(self._kl(case, node))
        except CapacityError:
            kl = None
        except IsthmusError as error:
            log.warning("a request could not be compared", worker=node.name, reason=str(error))
            case.tries = MAX_TRIES
            kl = None
        if kl is None and case.tries < MAX_TRIES:
            return
        if isinstance(case, Trial):
            self._tried(case, node, kl)
        elif kl is not None:
            self._judge(case, node, kl)
        # It may have given way to a newer one meanwhile.
        self._waiting = deque(other for other in self._waiting if other is not case)

    async def _undisturbed(self, work: Coroutine[Any, Any, V]) -> V | None:
        """What ``work`` returns; None if a request came before it was done."""
        task = asyncio.create_task(work)
        try:
            while not task.done() and not self._is_busy():
                await asyncio.wait({task}, timeout=POLL_S)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _kl(self, case: Case | Trial, node: DecodeNode) -> float | None:
        """How far KV from the wire is from the worker's own; None if that could not be seen.

        Any prefill node may be why a codec is off: it is tried over all that answer, and the worst one counts.
        """
        by_wire: list[Top | None]
        if isinstance(case, Trial):
            asked = [prefill for prefill in self._prefill if prefill.up]
            by_wire = [await prediction_by_wire(each, node, case.codec, case.tokens, case.tenant) for each in asked]
        else:
            by_wire = [case.evidence.top]
        known = [dict(top) for top in by_wire if top]
        own = await own_prediction(node, case.tokens) if known and len(known) == len(by_wire) else None
        return max(least_kl(dict(own), top) for top in known) if own else None

    def _judge(self, case: Case, node: DecodeNode, kl: float) -> None:
        record = self._records.setdefault((node.name, case.codec), Record())
        record.learn(kl)
        self._found(case.seq, case.codec, kl)
        log.info(
            "compared KV from the wire with the worker's own", worker=node.name, codec=case.codec, seq=case.seq, kl=kl
        )
        if record.is_bad(self._max_kl):
            self._switch_off(node, case.codec, kl)

    def _switch_off(self, node: DecodeNode, codec: str, kl: float) -> None:
        possible = node.welcome.codecs if node.welcome else (codec,)
        exact = codec == possible[0]
        reason = f"KV changes the next token's distribution by {kl:.3g} nats; {self._max_kl:g} are allowed"
        self._probations.begin(node.name, codec, possible if exact else (codec,), reason, time.monotonic_ns())
        node.distrusted = self._probations.distrusted(node.name)
        log.error(
            "answers were wrong: KV from the wire is not what the worker computes itself; switched off",
            worker=node.name,
            codec=codec,
            kl=kl,
            max_kl=self._max_kl,
            route_off=not node.codecs,
        )

    def _tried(self, trial: Trial, node: DecodeNode, kl: float | None) -> None:
        way, now_ns = (node.name, trial.codec), time.monotonic_ns()
        log.info("tried a codec that is switched off", worker=node.name, codec=trial.codec, kl=kl)
        if kl is None:
            self._probations.postpone(*way, now_ns)
        elif kl > self._max_kl:
            self._probations.failed(*way, now_ns)
        elif self._probations.passed(*way):
            # As if it were new; what the worker has kept of KV may still be wrong.
            self._records.pop(way, None)
            node.kv_era += 1
            node.distrusted = self._probations.distrusted(node.name)
            log.warning("KV from the wire is right again; switched on", worker=node.name, codec=trial.codec)
