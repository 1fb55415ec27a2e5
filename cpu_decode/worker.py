"""The decode worker's I/O thread: control messages in, tokens out, frames into the engine's reach.

It owns both sockets, admission, the landing pool and the record of who asked for what; the engine owns the context.
They talk through the inbox of the one and the outbox of the other; a record is dropped at exactly one place: when the
engine says that it has let go.
"""

from __future__ import annotations

import os
import queue
import secrets
import threading
import time

import structlog
import zmq

from cpu_decode.admission import Admission
from cpu_decode.announce import Announcer
from cpu_decode.asked import check
from cpu_decode.binding import MemoryWatch
from cpu_decode.engine import Ended, Engine, Event, Injected, Prompted, Released, Restored
from cpu_decode.grammar import Grammars
from cpu_decode.landing import LandingPlace, LandingPool
from cpu_decode.llama import Context, Model
from cpu_decode.prefix import Block
from cpu_decode.reuse import Plan, PrefixCache
from cpu_decode.sampling import Sampler
from cpu_decode.sequence import Sequence
from transfer import codecs
from transfer.config import Decode, Link
from transfer.doorkeeper import Doorkeeper
from transfer.errors import CapacityError, IsthmusError, ProtocolError, RequestError
from transfer.geometry import KVGeometry, require_same
from transfer.keys import ServerKeys, secure_server
from transfer.listen import bind
from transfer.messages import (
    MAX_MESSAGE_BYTES,
    Abort,
    Announce,
    Failure,
    FromWorker,
    Hello,
    Landing,
    Ping,
    Reserve,
    Start,
    Status,
    Ticket,
    Tokens,
    Welcome,
    decode_to_worker,
    encode,
    require_protocol,
)
from transfer.notify import Supervisor
from transfer.receiver import KVReceiver

log = structlog.get_logger()

MESSAGES_PER_TURN = 64
# A proxy pings every second; one that is silent this long is gone, and its requests with it.
CLIENT_SILENCE_S = 10.0
POLL_MS = 500
# Injecting what has just been computed is faster than injecting what comes from the link: half of 5 ms, to be safe.
INJECT_S = 0.0025
CHUNK_STEP_TOKENS = 32


class Admitted:
    """A request between Reserve and Released: whose it is and what was promised to it."""

    def __init__(self, client: bytes, seq_ids: list[int], reserve: Reserve, fidelity: str) -> None:
        self.client = client
        # The first one's cells get the prompt; there is one for each choice.
        self.seq_ids = seq_ids
        self.seq_id = seq_ids[0]
        self.constrained = bool(reserve.sampling.json_schema or reserve.sampling.grammar)
        self.prompt = reserve.prompt
        self.fidelity = fidelity
        # The blocks that the engine copies its KV into when it has ended.
        self.keeping: list[Block] = []
        # These three are for KV from the wire; a local prefill has no landing.
        self.ticket = ""
        self.landing: LandingPlace | None = None
        self.reserved_buffers = 0


class Worker:
    """One llama.cpp context behind a control socket and a KV socket."""

    def __init__(
        self,
        model: Model,
        context: Context,
        geometry: KVGeometry,
        decode: Decode,
        link: Link,
        keys: ServerKeys | None = None,
    ) -> None:
        # Set by the service that binds this worker to a NUMA node.
        self.memory: MemoryWatch | None = None
        self._geometry = geometry
        self._model = model
        self._decode = decode
        self._link = link
        model.require_window(geometry)
        self._form = Landing(cell_type=decode.cell_type, rope_order=model.rope_order)
        self._admission = Admission(decode.num_cells, decode.max_sequences)
        self._prefixes = PrefixCache(geometry, decode.cell_type, decode.pool_mib << 20)
        self._chunk_tokens = link.chunk_tokens
        self._pool = self._new_pool()
        self._grammars = Grammars(model)
        self._requests: dict[str, Admitted] = {}
        self._clients: dict[bytes, int] = {}
        self._outbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = threading.Event()
        self._draining = threading.Event()
        self._drained_by_ns = 0
        self._announcer: Announcer | None = None
        self.engine = Engine(context, batch_tokens=decode.prefill_batch_tokens, emit=self._post)
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._keys = keys
        self._doorkeeper = Doorkeeper(self._zmq, keys) if keys else None
        self._control = self._zmq.socket(zmq.ROUTER)
        self._control.maxmsgsize = MAX_MESSAGE_BYTES
        self._control.sndhwm = self._control.rcvhwm = 10_000
        self._control.linger = 200
        self._control.router_mandatory = True
        if keys:
            secure_server(self._control, keys, "proxy")
        bind(self._control, decode.host, decode.control_port, "[decode] control_port")
        self.name = f"{decode.advertise_host}:{self.control_port}"
        self._receiver = KVReceiver(
            self._zmq,
            decode.host,
            geometry,
            frame_bytes=link.frame_mib << 20,
            control_port=decode.kv_control_port,
            frames_port=decode.kv_port,
            seal=link.seal,
            keys=keys,
        )
        if self._doorkeeper:
            self._doorkeeper.watch(self._control)
            self._doorkeeper.watch(self._receiver.control)

    def run(self) -> None:
        """Serve until :meth:`stop`, or until the engine fails (raises its :class:`EngineError`)."""
        poller = zmq.Poller()
        for source in (self._control, self._receiver.control, self._receiver.frames, self._wake):
            poller.register(source, zmq.POLLIN)
        supervisor = Supervisor()
        self.engine.start()
        self._chunk_tokens = even_chunk_tokens(self._link.chunk_tokens, self.engine.inject_tokens_per_s)
        self._pool = self._new_pool()
        log.info(
            "decode worker is ready",
            worker=self.name,
            prefill=self.engine.prefill_basis,
            inject_tokens_per_s=round(self.engine.inject_tokens_per_s),
            chunk_tokens=self._chunk_tokens,
        )
        try:
            while not self._stopping.is_set() and self.engine.failed is None:
                supervisor.alive()
                ready = dict(poller.poll(POLL_MS))
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                self._deliver()
                self._listen()
                self._receiver.turn()
                if self._announcer:
                    self._announcer.turn(self._announcement)
                if self._drained:
                    break
                self._drop_silent_clients()
            self._deliver()
        finally:
            self.engine.stop()
            if self._announcer:
                self._announcer.close()
            self._control.close()
            self._receiver.close()
            if self._doorkeeper:
                self._doorkeeper.close()
            self._zmq.term()
            os.close(self._wake)
        if self.engine.failed is not None and not self._stopping.is_set():
            raise self.engine.failed

    def stop(self) -> None:
        """Make :meth:`run` return; safe from any thread and from a signal handler."""
        self._stopping.set()

    def drain(self) -> None:
        """Take no new requests, and make :meth:`run` return when the last one has ended or ``drain_s`` have passed.

        Asked for again, it returns at once. Safe from any thread and from a signal handler.
        """
        if self._draining.is_set():
            self.stop()
        self._drained_by_ns = time.monotonic_ns() + int(self._decode.drain_s * 1e9)
        self._draining.set()

    def announce_to(self, endpoint: str) -> None:
        """Tell the proxy's registry at ``endpoint`` about this worker while it serves."""
        self._announcer = Announcer(self._zmq, endpoint, self._keys)
        if self._doorkeeper:
            self._doorkeeper.watch(self._announcer.socket)

    @property
    def control_port(self) -> int:
        """The TCP port that the control socket is bound to."""
        return int(self._control.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])

    @property
    def status(self) -> Status:
        """What the worker would answer to a Ping now."""
        return Status(
            worker=self.name,
            used_cells=self._admission.used_cells,
            num_cells=self._admission.num_cells,
            running_sequences=self.engine.running_sequences,
            reserved_sequences=self._admission.admitted,
            max_sequences=self._admission.max_sequences,
            landing_bytes=self._pool.in_use * self._pool.buffer_bytes,
            prefill_tokens_per_s=self.engine.prefill_tokens_per_s,
            prefill_basis=self.engine.prefill_basis,
            remote_memory_fraction=self.memory.remote_fraction if self.memory else 0.0,
            draining=self._draining.is_set(),
            retained_bytes=self._prefixes.used_bytes,
            retained_sequences=self._prefixes.num_prefixes,
            prefix_hits=self._prefixes.hits,
            reused_tokens=self._prefixes.reused_tokens,
        )

    @property
    def _announcement(self) -> Announce:
        return Announce(
            worker=self.name,
            control_endpoint=_endpoint(self._decode.advertise_host, self.control_port),
            draining=self._draining.is_set(),
        )

    @property
    def _drained(self) -> bool:
        late = time.monotonic_ns() > self._drained_by_ns
        return self._draining.is_set() and (not self._requests or late)

    def _new_pool(self) -> LandingPool:
        decode = self._decode
        return LandingPool(self._geometry, decode.cell_type, self._chunk_tokens, decode.landing_mib << 20)

    def _post(self, event: Event) -> None:
        self._outbox.put(event)
        os.eventfd_write(self._wake, 1)

    # What the engine says.

    def _deliver(self) -> None:
        while not self._outbox.empty():
            event = self._outbox.get()
            request = self._requests.get(event.request_id)
            match event:
                case Injected():
                    self._pool.give_back(event.chunk.buffer)
                    if request is not None and request.landing is not None:
                        request.landing.credit_chunks += 1
                        self._receiver.grant(request.ticket, request.landing.credit_chunks)
                case Prompted():
                    if request is not None:
                        self._prefixes.lend(request.seq_id, request.prompt, request.fidelity)
                case Restored():
                    self._prefixes.used(event.plan)
                case Ended():
                    self._part(event)
                case Released():
                    self._forget(event.request_id)
                case Tokens() | Failure():
                    if request is not None and not self._send(request.client, event):
                        # A stream with a hole would be a wrong answer.
                        self.engine.abort(event.request_id)

    def _part(self, ended: Ended) -> None:
        """Have the engine keep the KV of an ended request and then free its cells.

        Whoever was admitted to share them before this was told to the engine before, too.
        """
        request = self._requests[ended.request_id]
        self._prefixes.take_back(request.seq_id)
        request.keeping = self._prefixes.keep(ended.tokens, request.fidelity)
        self.engine.leave(ended.request_id, request.keeping)

    def _forget(self, request_id: str) -> None:
        request = self._requests.pop(request_id)
        self._prefixes.kept(request.keeping)
        self._release(request.seq_ids)
        self._pool.unreserve(request.reserved_buffers)
        if request.landing is not None:
            self._receiver.cancel(request.ticket, "the request has ended")
            request.landing.release()

    # What clients say.

    def _listen(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            try:
                client, *parts = self._control.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._clients[client] = time.monotonic_ns()
            request_id = ""
            try:
                if len(parts) != 1:
                    raise ProtocolError(f"a control message has one part, not {len(parts)}")
                message = decode_to_worker(parts[0])
                request_id = getattr(message, "request_id", "")
                match message:
                    case Hello():
                        self._send(client, self._welcome(message))
                    case Ping():
                        self._send(client, self.status)
                    case Reserve():
                        self._send(client, self._reserve(client, message))
                    case Start():
                        self._check_owner(client, request_id)
                        self._start(message)
                    case Abort():
                        if request_id in self._requests:
                            self._check_owner(client, request_id)
                            self.engine.abort(request_id)
            except IsthmusError as error:
                log.warning("refused a control message", request_id=request_id, reason=str(error))
                param = getattr(error, "param", None)
                self._send(client, Failure(code=error.code, message=str(error), request_id=request_id, param=param))

    def _welcome(self, hello: Hello) -> Welcome:
        require_protocol(hello.protocol)
        if hello.geometry is not None:
            require_same(self._geometry, hello.geometry)
        return Welcome(
            worker=self.name,
            geometry=self._geometry,
            landing=self._form,
            codecs=codecs.landing_codecs(self._decode.cell_type, self._geometry),
            kv_endpoint=self._kv_endpoint,
            num_cells=self._admission.num_cells,
            max_sequences=self._admission.max_sequences,
        )

    @property
    def _kv_endpoint(self) -> str:
        return _endpoint(self._decode.advertise_host, self._receiver.port)

    def _reserve(self, client: bytes, reserve: Reserve) -> Ticket:
        """Promise everything that the request will need, or nothing."""
        if self._draining.is_set():
            raise CapacityError("this decode worker is about to end and takes no new requests")
        self._check_request(reserve)
        grammar = self._grammars.read(reserve)
        fidelity = self._prefixes.fidelity(reserve)
        plan = self._prefixes.find(reserve.prompt, fidelity)
        request = Admitted(client, self._admit(reserve, plan), reserve, fidelity)
        ticket = secrets.token_hex(16)
        try:
            if reserve.source == "kv":
                self._expect_kv(request, ticket, reserve, plan)
        except IsthmusError:
            self._release(request.seq_ids)
            raise
        self._requests[reserve.request_id] = request
        self._prefixes.use(plan)
        samplers = [Sampler(self._model, reserve, choice, grammar) for choice in range(reserve.choices)]
        others = tuple(
            Sequence(reserve, request.seq_ids[choice], samplers[choice], choice=choice)
            for choice in range(1, reserve.choices)
        )
        self.engine.admit(Sequence(reserve, request.seq_id, samplers[0], plan.num_tokens, others=others), plan)
        return Ticket(
            request_id=reserve.request_id,
            ticket=ticket,
            kv_endpoint=self._kv_endpoint,
            codec=reserve.codec,
            landing=self._form,
            chunk_tokens=self._chunk_tokens,
            credit_chunks=request.reserved_buffers,
            deadline_ms=reserve.deadline_ms,
            reused_tokens=plan.num_tokens,
        )

    def _admit(self, reserve: Reserve, plan: Plan) -> list[int]:
        """Promise cells for the prompt and for each choice's answer; returns a sequence id for each choice."""
        max_tokens = reserve.sampling.max_tokens
        num_tokens = len(reserve.prompt) + max_tokens
        self._admission.require(num_tokens + (reserve.choices - 1) * max_tokens)
        seq_ids = [self._admission.admit(num_tokens, plan.donor, plan.shared_tokens)]
        try:
            while len(seq_ids) < reserve.choices:
                seq_ids.append(self._admission.admit(max_tokens))
        except CapacityError:
            self._release(seq_ids)
            raise
        return seq_ids

    def _release(self, seq_ids: list[int]) -> None:
        for seq_id in seq_ids:
            self._admission.release(seq_id)

    def _start(self, start: Start) -> None:
        request = self._requests[start.request_id]
        if start.first_token is not None:
            if not 0 <= start.first_token < self._model.vocab_size:
                raise ProtocolError(f"first_token {start.first_token} is outside 0..{self._model.vocab_size - 1}")
            if request.constrained:
                raise ProtocolError("a first token cannot obey a grammar that only the worker knows; start without it")
        if start.local and request.landing is not None:
            self._receiver.cancel(request.ticket, "the rest of the prompt is computed by the decode worker")
            request.landing.release()
        self.engine.begin(start.request_id, start.first_token, first_text_sent=start.first_text_sent, local=start.local)

    def _check_request(self, reserve: Reserve) -> None:
        if reserve.request_id in self._requests:
            raise RequestError(f"request id {reserve.request_id!r} is in use", "request_id")
        check(reserve, self._model.vocab_size, self._admission.max_sequences)

    def _expect_kv(self, request: Admitted, ticket: str, reserve: Reserve, plan: Plan) -> None:
        codecs.for_cells(reserve.codec, self._decode.cell_type, self._geometry)
        request.reserved_buffers = self._pool.reserve(
            # As many tokens as the configuration says, in chunks of the size that injects evenly.
            self._link.credit_chunks * self._link.chunk_tokens // self._chunk_tokens
        )
        request.ticket = ticket
        request_id = reserve.request_id
        request.landing = LandingPlace(
            self._geometry,
            self._decode.cell_type,
            reserve.codec,
            self._pool,
            num_tokens=len(reserve.prompt),
            start_token=plan.num_tokens,
            chunk_tokens=self._chunk_tokens,
            credit_chunks=request.reserved_buffers,
            on_chunk=lambda chunk: self.engine.land(request_id, chunk),
            on_end=lambda report: self.engine.complete(request_id, report),
            on_fail=lambda error: self.engine.fail(request_id, error),
        )
        self._receiver.expect(ticket, request.landing, request.reserved_buffers)

    def _check_owner(self, client: bytes, request_id: str) -> None:
        request = self._requests.get(request_id)
        if request is None or request.client != client:
            raise ProtocolError(f"request {request_id!r} is not known here; reserve it first")

    def _drop_silent_clients(self) -> None:
        oldest = time.monotonic_ns() - int(CLIENT_SILENCE_S * 1e9)
        for client in [c for c, seen_ns in self._clients.items() if seen_ns < oldest]:
            del self._clients[client]
            for request_id in [r for r, request in self._requests.items() if request.client == client]:
                log.warning("client is gone, its request with it", request_id=request_id)
                self.engine.abort(request_id)

    def _send(self, client: bytes, message: FromWorker) -> bool:
        """Queue ``message``; False if the client is gone or has stopped reading."""
        try:
            self._control.send_multipart([client, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            request_id = getattr(message, "request_id", "")
            # A client that only asked how we are may leave before it hears.
            say = log.warning if request_id else log.debug
            say("could not answer a client", request_id=request_id, reason=str(error))
            return False
        return True


def even_chunk_tokens(most_tokens: int, inject_tokens_per_s: float) -> int:
    """The largest chunk, at most ``most_tokens``, whose injection holds the other sequences up for a few ms only.

    Quantizing codecs work in blocks of 32, hence multiples of that.
    """
    return min(
        most_tokens,
        max(CHUNK_STEP_TOKENS, int(INJECT_S * inject_tokens_per_s) // CHUNK_STEP_TOKENS * CHUNK_STEP_TOKENS),
    )


def _endpoint(host: str, port: int) -> str:
    return f"tcp://{host}:{port}"
