"""The parity guard: whether KV that came over the wire predicts what the worker's own would.

An answer that is fluent and wrong is the worst that a split can do: HTTP 200, and KV in the wrong order. Of a share of
the split requests the guard keeps the prompt and the likeliest tokens that the worker saw right after it
(``witness.py``). When nothing else is to do, the worker computes the same prompt itself, without reusing any KV, and
the two distributions are compared (``divergence.py``).

One position that differs may be chance, for fp16 attention and quantized weights amplify any rounding now and then; so
a codec is switched off for a worker when two of its last three comparisons were above the threshold. Every request is
looked at until ``FIRST_CHECKS`` comparisons have been made, and while the last one was bad. Where the codec is the one
that carries KV just as the cells hold it, no other can be better: then the worker gets no KV at all, and nothing that
it has kept of earlier KV is reused. That lasts until the proxy starts again: nobody but a person can say that a defect
is gone.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable

import structlog

from proxy.decode_node import DecodeNode
from proxy.divergence import least_kl
from proxy.nodes import DecodePool
from proxy.witness import TOP, Evidence
from transfer.errors import CapacityError, IsthmusError
from transfer.messages import Reserve, Sampling

FIRST_CHECKS = 4
MAX_WAITING = 8
MAX_TRIES = 3
# Nothing may have happened for so long before a comparison, and whatever happens ends it.
QUIET_S = 0.5
POLL_S = 0.05
RESERVE_S = 10.0
PREFILL_S = 300.0

log = structlog.get_logger()


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
    """A request that waits to be looked at."""

    def __init__(self, seq: int, evidence: Evidence) -> None:
        self.seq = seq
        self.evidence = evidence
        self.tries = 0


class ParityGuard:
    """Compares a ``share`` of split requests, none if it is 0, when not ``busy``; over ``max_kl`` nats is too much.

    ``found`` hears of each comparison: the entry's number, the codec and the KL.
    """

    def __init__(
        self,
        workers: DecodePool,
        share: float,
        max_kl: float,
        *,
        busy: Callable[[], bool],
        found: Callable[[int, str, float], None],
    ) -> None:
        self._workers = workers
        self._share = share
        self._max_kl = max_kl
        self._is_busy = busy
        self._found = found
        self._records: dict[tuple[str, str], Record] = {}
        self._waiting: deque[Case] = deque()
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

    async def run(self) -> None:
        """Look at what was kept until cancelled."""
        while True:
            self._news.clear()
            if not self._waiting:
                await self._news.wait()
            await asyncio.sleep(POLL_S)
            case = self._waiting[0]
            node = self._workers.nodes.get(case.evidence.worker)
            if node is None or node.distrusted.get(case.evidence.codec):
                self._waiting.remove(case)
            elif self._is_quiet(node):
                await self._look_at(case, node)

    def _is_quiet(self, node: DecodeNode) -> bool:
        now_ns = time.monotonic_ns()
        status = node.status
        idle = node.takes_requests and status is not None and not status.reserved_sequences and not node.conversations
        if self._is_busy() or not idle:
            self._quiet_since_ns = now_ns
        return now_ns - self._quiet_since_ns >= QUIET_S * 1e9

    async def _look_at(self, case: Case, node: DecodeNode) -> None:
        case.tries += 1
        work = asyncio.create_task(_own_prediction(node, case.evidence.tokens))
        try:
            while not work.done() and not self._is_busy():
                await asyncio.wait({work}, timeout=POLL_S)
            own = work.result() if work.done() else None
        except CapacityError:
            own = None
        except IsthmusError as error:
            log.warning("a request could not be compared", worker=node.name, reason=str(error))
            case.tries = MAX_TRIES
            own = None
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        if own is not None or case.tries >= MAX_TRIES:
            # It may have given way to a newer one meanwhile.
            self._waiting = deque(other for other in self._waiting if other is not case)
        if own is not None:
            self._judge(case, node, least_kl(dict(own), dict(case.evidence.top)))

    def _judge(self, case: Case, node: DecodeNode, kl: float) -> None:
        codec = case.evidence.codec
        record = self._records.setdefault((node.name, codec), Record())
        record.learn(kl)
        self._found(case.seq, codec, kl)
        log.info("compared KV from the wire with the worker's own", worker=node.name, codec=codec, seq=case.seq, kl=kl)
        if record.is_bad(self._max_kl):
            self._switch_off(node, codec, kl)

    def _switch_off(self, node: DecodeNode, codec: str, kl: float) -> None:
        possible = node.welcome.codecs if node.welcome else (codec,)
        exact = codec == possible[0]
        reason = f"KV changes the next token's distribution by {kl:.3g} nats; {self._max_kl:g} are allowed"
        node.distrusted |= dict.fromkeys(possible if exact else (codec,), reason)
        log.error(
            "answers were wrong: KV from the wire is not what the worker computes itself; switched off",
            worker=node.name,
            codec=codec,
            kl=kl,
            max_kl=self._max_kl,
            route_off=not node.codecs,
        )


async def _own_prediction(node: DecodeNode, tokens: list[int]) -> tuple[tuple[int, float], ...] | None:
    """What ``node`` predicts after ``tokens`` when it computes all of them itself; None if it did not."""
    request_id = f"parity-{uuid.uuid4().hex}"
    reserve = Reserve(
        request_id=request_id,
        prompt=tokens,
        sampling=Sampling(max_tokens=1, temperature=0.0, logprobs=TOP, ignore_eos=True),
        source="local",
        reuse=False,
        deadline_ms=round(PREFILL_S * 1000),
    )
    async with node.conversation(request_id, 1, cells=len(tokens) + 1) as conversation:
        ticket = await conversation.reserve(reserve, RESERVE_S)
        if ticket.reused_tokens:
            log.warning("a worker reuses KV where it was asked not to; nothing is compared", worker=node.name)
            return None
        await conversation.start(None, first_text_sent=False)
        said = await conversation.tokens(PREFILL_S)
        return said.logprobs[0].top if said.logprobs else None
