"""What requests have been promised: cells and sequence ids, prefixes that they reuse, landing buffers.

Owned by the I/O thread. A record is dropped at exactly one place: when the engine says that it has let go.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterator
from collections.abc import Sequence as Several

from cpu_decode.admission import Admission
from cpu_decode.asked import check
from cpu_decode.engine import Engine
from cpu_decode.events import (
    ChoiceFreed,
    Copied,
    Ended,
    Event,
    Injected,
    Preempted,
    Prompted,
    Released,
    Restored,
    Settled,
)
from cpu_decode.fetching import Fetching
from cpu_decode.grammar import Grammars
from cpu_decode.landing import LandingPlace, LandingPool, LandingReport
from cpu_decode.llama import Cells, Model
from cpu_decode.pool.block_log import BlockLog
from cpu_decode.pool.opened import open_tiers, seed_of
from cpu_decode.prefix import Block
from cpu_decode.reuse import Plan, PrefixCache, Scope
from cpu_decode.sampling import Sampler
from cpu_decode.sequence import Sequence
from cpu_decode.state import state_bytes
from cpu_decode.waiting import Need, steps_until_room
from transfer import codecs
from transfer.config import Decode, Link
from transfer.errors import CapacityError, ConfigError, IsthmusError, ProtocolError, RequestError
from transfer.geometry import NO_KV, KVGeometry
from transfer.messages import Landing, Reserve, Start, Ticket
from transfer.receiver import KVReceiver

# Injecting what has just been computed is faster than injecting what comes from the link: half of 5 ms, to be safe.
INJECT_S = 0.0025
CHUNK_STEP_TOKENS = 32


class Admitted:
    """A request between Reserve and Released: whose it is and what was promised to it."""

    def __init__(self, client: bytes, seq_ids: list[int], reserve: Reserve, scope: Scope | None) -> None:
        self.client = client
        # The first one's cells get the prompt; there is one for each choice that has not ended before the others.
        self.seq_ids = dict(enumerate(seq_ids))
        self.seq_id = seq_ids[0]
        self.choices: tuple[Sequence, ...] = ()
        self.constrained = reserve.sampling.constrained
        self.prompt = reserve.prompt
        self.scope = scope
        self.reserved_ns = time.monotonic_ns()
        self.reused_tokens = 0
        # The blocks that the engine copies its KV into when it has ended.
        self.keeping: list[Block] = []
        # These three are for KV from the wire; a local prefill has no landing.
        self.ticket = ""
        self.landing: LandingPlace | None = None
        self.reserved_buffers = 0
        # For KV that gathers before it gets cells.
        self.gathering_buffers = 0

    @property
    def left_tokens(self) -> int:
        """Steps until the last of its choices ends, if none does early."""
        return max(0 if choice.finished else choice.left_tokens for choice in self.choices)


class Reservations:
    """Makes promises, hands requests to the engine, and takes promises back as the engine says."""

    def __init__(
        self,
        model: Model,
        cells: Cells,
        geometry: KVGeometry,
        decode: Decode,
        link: Link,
        engine: Engine,
        receiver: KVReceiver,
    ) -> None:
        self._model = model
        self._geometry = geometry
        self._decode = decode
        self._link = link
        self._engine = engine
        self._receiver = receiver
        # Where no KV lands, any order will do.
        rope_order = "half" if geometry == NO_KV else model.rope_order
        self.form = Landing(cell_type=decode.cell_type, rope_order=rope_order)
        self._unified = cells.unified
        self.admission = Admission(cells.num_cells, decode.max_sequences, cells.sequence_cells)
        seed, known = seed_of(decode, geometry, rope_order, model.gguf), BlockLog()
        below = open_tiers(decode, seed, known)
        self.prefixes = PrefixCache(
            geometry, decode.cell_type, decode.pool_mib << 20, seed, known, below, unified=cells.unified
        )
        self.fetching = Fetching(self.prefixes, lambda: engine.batching.prefill_tokens_per_s)
        self.chunk_tokens = link.chunk_tokens
        self.pool = self._new_pool()
        self._require_landing_memory()
        self._grammars = Grammars(model)
        self._requests: dict[str, Admitted] = {}

    def __len__(self) -> int:
        """Requests that hold something."""
        return len(self._requests)

    def even_chunks(self, inject_tokens_per_s: float) -> None:
        """Before anything is promised: make chunks small enough for their injection to take a few ms."""
        self.chunk_tokens = even_chunk_tokens(self._link.chunk_tokens, inject_tokens_per_s)
        self.pool = self._new_pool()

    @property
    def kv_endpoint(self) -> str:
        """Where prefill nodes introduce themselves."""
        return f"tcp://{self._decode.advertise_host}:{self._receiver.port}"

    def client(self, request_id: str) -> bytes | None:
        """Who asked for ``request_id``; None if it holds nothing here."""
        request = self._requests.get(request_id)
        return request.client if request else None

    def of(self, client: bytes) -> Iterator[str]:
        """The requests of ``client``."""
        return (request_id for request_id, request in self._requests.items() if request.client == client)

    def check(self, reserve: Reserve) -> None:
        """Raise :class:`RequestError` if ``reserve`` can never be served, whatever is free."""
        if reserve.request_id in self._requests or self.fetching.client(reserve.request_id) is not None:
            raise RequestError(f"request id {reserve.request_id!r} is in use", "request_id")
        check(reserve, self._model.vocab_size, self.admission.max_sequences)
        sharing = reserve.choices if self._unified else 1
        self.admission.require(len(reserve.prompt) + sharing * reserve.sampling.max_tokens)
        if reserve.source == "kv":
            codecs.for_cells(reserve.codec, self._decode.cell_type, self._geometry)

    def reserve(self, client: bytes, reserve: Reserve, queued_ns: int = 0) -> Ticket:
        """Promise everything that the request will need, or nothing; it has waited for ``queued_ns``.

        Raises :class:`CapacityError` if it cannot be had now. It has passed :meth:`check`.
        """
        grammar = self._grammars.read(reserve)
        scope = self.prefixes.scope(reserve)
        plan = self.prefixes.find(reserve.prompt, scope)
        request = Admitted(client, self._admit(reserve, plan), reserve, scope)
        ticket = secrets.token_hex(16)
        try:
            request.gathering_buffers = self._room_to_gather(reserve, plan)
            if reserve.source == "kv":
                self._expect_kv(request, ticket, reserve, plan)
        except IsthmusError:
            self.pool.unreserve(request.gathering_buffers)
            self._release(list(request.seq_ids.values()))
            raise
        request.reused_tokens = plan.num_tokens
        self._requests[reserve.request_id] = request
        self.prefixes.use(plan)
        samplers = [Sampler(self._model, reserve, choice, grammar) for choice in range(reserve.choices)]
        others = tuple(
            Sequence(reserve, request.seq_ids[choice], samplers[choice], client=client, choice=choice)
            for choice in range(1, reserve.choices)
        )
        first = Sequence(
            reserve,
            request.seq_id,
            samplers[0],
            plan.num_tokens,
            client=client,
            others=others,
            promised_tokens=self._promised_cells(reserve),
            queued_ns=queued_ns,
        )
        request.choices = first.choices
        first.restored_tokens, first.restore_ns = plan.restored_tokens, plan.fetch_ns
        self._engine.admit(first, plan)
        return Ticket(
            request_id=reserve.request_id,
            ticket=ticket,
            kv_endpoint=self.kv_endpoint,
            codec=reserve.codec,
            landing=self.form,
            chunk_tokens=self.chunk_tokens,
            credit_chunks=request.reserved_buffers,
            deadline_ms=reserve.deadline_ms,
            reused_tokens=plan.num_tokens,
        )

    def start(self, start: Start) -> None:
        """Have the engine begin; raises :class:`ProtocolError` if the first token cannot be one."""
        request = self._requests[start.request_id]
        if start.first_token is not None:
            if not 0 <= start.first_token < self._model.vocab_size:
                raise ProtocolError(f"first_token {start.first_token} is outside 0..{self._model.vocab_size - 1}")
            if request.constrained:
                raise ProtocolError("a first token cannot obey a grammar that only the worker knows; start without it")
        if start.local and request.landing is not None:
            self._receiver.cancel(request.ticket, "the rest of the prompt is computed by the decode worker")
            request.landing.release()
        self._engine.begin(
            start.request_id, start.first_token, first_text_sent=start.first_text_sent, local=start.local
        )

    def wait_steps(self, line: Several[Reserve]) -> int:
        """Steps until the last of ``line`` has room, if nobody ends early; 0 if that cannot be said."""
        running = [
            Need(self.admission.cells(request.seq_ids.values()), len(request.seq_ids), request.left_tokens)
            for request in self._requests.values()
        ]
        wanted = [
            Need(self._promised_cells(each) + (each.choices - 1) * self._more_cells(each), each.choices,
                 each.sampling.max_tokens)
            for each in line
        ]  # fmt: skip
        return steps_until_room(self.admission.free_cells, self.admission.free_sequences, running, wanted)

    def handle(self, event: Event) -> None:
        """Take in what the engine has done."""
        request = self._requests.get(event.request_id)
        match event:
            case Injected():
                self.pool.give_back(event.chunk.buffer)
                if request is not None and request.landing is not None:
                    request.landing.credit_chunks += 1
                    self._receiver.grant(request.ticket, request.landing.credit_chunks)
            case Prompted():
                if request is not None:
                    self._prompted(event.request_id, request)
            case Preempted():
                if request is not None:
                    self.prefixes.take_back(request.seq_id)
            case ChoiceFreed():
                if request is not None:
                    self.admission.release(request.seq_ids.pop(event.choice))
            case Settled():
                if request is not None:
                    self._give_landing_memory_back(request)
            case Restored():
                self.prefixes.used(event.plan)
            case Copied():
                self.prefixes.kept(event.blocks)
            case Ended():
                self._part(event)
            case Released():
                self._forget(event.request_id)

    def _admit(self, reserve: Reserve, plan: Plan) -> list[int]:
        """Promise cells for the prompt and for each choice's answer; returns a sequence id for each choice."""
        seq_ids = [self.admission.admit(self._promised_cells(reserve), plan.donor, plan.shared_tokens)]
        try:
            while len(seq_ids) < reserve.choices:
                seq_ids.append(self.admission.admit(self._more_cells(reserve)))
        except CapacityError:
            self._release(seq_ids)
            raise
        return seq_ids

    def _promised_cells(self, reserve: Reserve) -> int:
        """Cells for the prompt and the first choice: fewer than its answer may need, if answers may be preempted.

        The engine preempts no request with several choices, and none in a stream, so theirs are promised in full.
        """
        share = self._decode.promised_share if reserve.choices == 1 and self._unified else 1.0
        return len(reserve.prompt) + math.ceil(share * reserve.sampling.max_tokens)

    def _more_cells(self, reserve: Reserve) -> int:
        """Cells for each choice but the first: in a stream of its own each has the prompt, too."""
        return reserve.sampling.max_tokens + (0 if self._unified else len(reserve.prompt))

    def _room_to_gather(self, reserve: Reserve, plan: Plan) -> int:
        """Reserve memory for KV that comes in parts and gets cells whole; returns how many landing buffers' worth."""
        num_tokens = len(reserve.prompt) if reserve.source == "kv" else plan.num_tokens
        if self._unified or not num_tokens:
            return 0
        return self.pool.set_aside(state_bytes(self._geometry, num_tokens, self._decode.cell_type))

    def _expect_kv(self, request: Admitted, ticket: str, reserve: Reserve, plan: Plan) -> None:
        request.reserved_buffers = self.pool.reserve(
            # As many tokens as the configuration says, in chunks of the size that injects evenly.
            self._link.credit_chunks * self._link.chunk_tokens // self.chunk_tokens
        )
        request.ticket = ticket
        request_id = reserve.request_id
        request.landing = LandingPlace(
            self._geometry,
            self._decode.cell_type,
            reserve.codec,
            self.pool,
            num_tokens=len(reserve.prompt),
            start_token=plan.num_tokens,
            chunk_tokens=self.chunk_tokens,
            credit_chunks=request.reserved_buffers,
            on_chunk=lambda chunk: self._engine.land(request_id, chunk),
            on_end=lambda report: self._landed(request_id, report),
            on_fail=lambda error: self._engine.fail(request_id, error),
        )
        self._receiver.expect(ticket, request.landing, request.reserved_buffers)

    def _landed(self, request_id: str, report: LandingReport) -> None:
        request = self._requests[request_id]
        self.fetching.arrived(
            report.sender.num_tokens - request.reused_tokens, time.monotonic_ns() - request.reserved_ns
        )
        self._engine.complete(request_id, report)

    def _prompted(self, request_id: str, request: Admitted) -> None:
        """Lend the prompt's cells, and keep it where it may outlive this worker."""
        self.prefixes.lend(request.seq_id, request.prompt, request.scope)
        blocks = self.prefixes.keep_early(request.prompt, request.scope)
        if blocks:
            self._engine.copy(request_id, blocks)

    def _part(self, ended: Ended) -> None:
        """Have the engine keep the KV of an ended request and then free its cells.

        Whoever was admitted to share them before this was told to the engine before, too.
        """
        request = self._requests[ended.request_id]
        self.prefixes.take_back(request.seq_id)
        request.keeping = self.prefixes.keep(ended.tokens, request.scope)
        self._engine.leave(ended.request_id, request.keeping)

    def _forget(self, request_id: str) -> None:
        request = self._requests.pop(request_id)
        self.prefixes.kept(request.keeping)
        self._release(list(request.seq_ids.values()))
        self._give_landing_memory_back(request)
        if request.landing is not None:
            self._receiver.cancel(request.ticket, "the request has ended")
            request.landing.release()

    def _give_landing_memory_back(self, request: Admitted) -> None:
        self.pool.unreserve(request.reserved_buffers + request.gathering_buffers)
        request.reserved_buffers = request.gathering_buffers = 0

    def _release(self, seq_ids: list[int]) -> None:
        for seq_id in seq_ids:
            self.admission.release(seq_id)

    def _require_landing_memory(self) -> None:
        """Raise :class:`ConfigError` if KV that gets cells whole could never gather."""
        most = state_bytes(self._geometry, self.admission.sequence_cells, self._decode.cell_type)
        needed_mib = (most + 2 * self.pool.buffer_bytes >> 20) + 1
        if not self._unified and self._decode.landing_mib < needed_mib:
            raise ConfigError(
                f"KV gathers before it gets a stream of {self.admission.sequence_cells} cells, which may take "
                f"{needed_mib} MiB; raise landing_mib or lower num_cells in [decode], or set cell_layout to unified"
            )

    def _new_pool(self) -> LandingPool:
        decode = self._decode
        return LandingPool(self._geometry, decode.cell_type, self.chunk_tokens, decode.landing_mib << 20)


def even_chunk_tokens(most_tokens: int, inject_tokens_per_s: float) -> int:
    """The largest chunk, at most ``most_tokens``, whose injection holds the other sequences up for a few ms only.

    Quantizing codecs work in blocks of 32, hence multiples of that.
    """
    return min(
        most_tokens,
        max(CHUNK_STEP_TOKENS, int(INJECT_S * inject_tokens_per_s) // CHUNK_STEP_TOKENS * CHUNK_STEP_TOKENS),
    )
