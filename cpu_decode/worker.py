"""The decode worker's I/O thread: control messages in, answers to them out, frames into the engine's reach.

It owns what was promised to whom (``reservations.py``); the engine owns the context. They talk through the inbox of the
one and the outbox of the other. Tokens leave from the engine's thread (``clients.py``).
"""

from __future__ import annotations

import os
import queue
import threading
import time

import msgspec
import structlog
import zmq

from cpu_decode import vitals
from cpu_decode.announce import Announcer
from cpu_decode.binding import MemoryWatch
from cpu_decode.clients import Clients
from cpu_decode.engine import Engine
from cpu_decode.events import ChoiceFreed, Event, Released, Settled
from cpu_decode.llama import Context, Model
from cpu_decode.pool.below import Fetched
from cpu_decode.reservations import Reservations
from cpu_decode.speculate import NO_GUESSING, Guessing
from cpu_decode.waiting import Line, Waiting
from cpu_decode.window_blocks import WindowBlocks
from transfer import codecs
from transfer.config import Decode, Link
from transfer.doorkeeper import Doorkeeper
from transfer.energy import PowerMeter
from transfer.errors import CapacityError, IsthmusError, ProtocolError, RequestError
from transfer.geometry import KVGeometry, require_same
from transfer.keys import ServerKeys
from transfer.messages import (
    Abort,
    Announce,
    Failure,
    Hello,
    Ping,
    Queued,
    Reserve,
    Start,
    Status,
    Ticket,
    Welcome,
    decode_to_worker,
    require_protocol,
)
from transfer.notify import Supervisor
from transfer.receiver import KVReceiver

log = structlog.get_logger()

# How late a deadline may be noticed; each look around takes a core from the threads that compute.
POLL_MS = 200
# Requests that wait for KV from below RAM go on without it in time.
FETCH_POLL_MS = 10


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
        guessing: Guessing = NO_GUESSING,
    ) -> None:
        # What the memory can do and a step reads beside KV; the service that starts this worker may know the first.
        self.memory_bytes_per_s = 0.0
        self._weights_bytes = model.size_bytes
        # Set by the service that binds this worker to a NUMA node.
        self.memory: MemoryWatch | None = None
        # The service that starts this worker may know how to measure it.
        self.power = PowerMeter(())
        self._geometry = geometry
        self._decode = decode
        self._outbox: queue.SimpleQueue[Event | Fetched] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = threading.Event()
        self._draining = threading.Event()
        self._drained_by_ns = 0
        self._announcer: Announcer | None = None
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._keys = keys
        self._doorkeeper = Doorkeeper(self._zmq, keys) if keys else None
        self._clients = Clients(self._zmq, decode, keys, self._wake_up)
        batch_tokens = max(decode.prefill_batch_tokens, decode.max_sequences)
        self.engine = Engine(
            context,
            batch_tokens=batch_tokens,
            emit=self._outbox.put,
            wake=self._wake_up,
            send=self._clients.send,
            guessing=guessing,
            windows=WindowBlocks(context, geometry, decode.cell_type) if decode.pool_mib else None,
        )
        self._line = Line(decode.max_queued)
        # Whether something has ended since the first in line was refused.
        self._may_move = False
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
        self._promised = Reservations(model, context.cells, geometry, decode, link, self.engine, self._receiver)
        if self._doorkeeper:
            self._doorkeeper.watch(self._clients.socket)
            self._doorkeeper.watch(self._receiver.control)

    def run(self) -> None:
        """Serve until :meth:`stop`, or until the engine fails (raises its :class:`EngineError`)."""
        poller = zmq.Poller()
        for source in (self._clients.descriptor, self._receiver.control, self._receiver.frames, self._wake):
            poller.register(source, zmq.POLLIN)
        supervisor = Supervisor()
        self.engine.start()
        self._promised.even_chunks(self.engine.batching.inject_tokens_per_s)
        self._promised.prefixes.below.start(self._post)
        log.info(
            "decode worker is ready",
            worker=self.name,
            prefill=self.engine.batching.prefill_basis,
            inject_tokens_per_s=round(self.engine.batching.inject_tokens_per_s),
            chunk_tokens=self._promised.chunk_tokens,
        )
        try:
            while not self._stopping.is_set() and self.engine.failed is None:
                supervisor.alive()
                ready = dict(poller.poll(FETCH_POLL_MS if self._promised.fetching else POLL_MS))
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                self._take_in()
                self._listen()
                for arriving in self._promised.fetching.late():
                    self._answer(arriving.client, arriving.reserve)
                self._serve_line()
                self._receiver.turn()
                if self._announcer:
                    self._announcer.turn(self._announcement)
                if self._drained:
                    break
                self._drop_silent_clients()
        finally:
            self.engine.stop()
            self._promised.prefixes.below.close()
            if self._announcer:
                self._announcer.close()
            self._clients.close()
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
        return self._clients.port

    @property
    def status(self) -> Status:
        """What the worker would answer to a Ping now."""
        return msgspec.structs.replace(
            vitals.status(self._promised, self.engine.batching, self._weights_bytes),
            worker=self.name,
            draining=self._draining.is_set(),
            queued_requests=len(self._line),
            memory_bytes_per_s=self.memory_bytes_per_s,
            remote_memory_fraction=self.memory.remote_fraction if self.memory else 0.0,
            **vitals.power(self.power.watts()),
        )

    @property
    def _announcement(self) -> Announce:
        return Announce(
            worker=self.name,
            control_endpoint=f"tcp://{self._decode.advertise_host}:{self.control_port}",
            draining=self._draining.is_set(),
        )

    @property
    def _drained(self) -> bool:
        late = time.monotonic_ns() > self._drained_by_ns
        waiting = self._promised.fetching or self._line
        return self._draining.is_set() and (not (self._promised or waiting) or late)

    def _post(self, event: Fetched) -> None:
        self._outbox.put(event)
        self._wake_up()

    def _wake_up(self) -> None:
        os.eventfd_write(self._wake, 1)

    # What the engine has done.

    def _take_in(self) -> None:
        """Take in what the engine has done, and KV that has come from below RAM."""
        while not self._outbox.empty():
            event = self._outbox.get()
            if isinstance(event, Fetched):
                if arriving := self._promised.fetching.end(event):
                    self._answer(arriving.client, arriving.reserve)
            else:
                self._promised.handle(event)
                self._may_move |= isinstance(event, Released | ChoiceFreed | Settled)

    # What clients say.

    def _listen(self) -> None:
        for client, parts in self._clients.heard():
            request_id = ""
            try:
                if len(parts) != 1:
                    raise ProtocolError(f"a control message has one part, not {len(parts)}")
                message = decode_to_worker(parts[0])
                request_id = getattr(message, "request_id", "")
                match message:
                    case Hello():
                        self._clients.send(client, [self._welcome(message)])
                    case Ping():
                        self._clients.send(client, [self._status(message)])
                    case Reserve():
                        self._take(client, message)
                    case Start():
                        self._check_owner(client, request_id)
                        self._promised.start(message)
                    case Abort():
                        if self._promised.client(request_id) is not None:
                            self._check_owner(client, request_id)
                        self._give_up(client, request_id)
            except IsthmusError as error:
                self._refuse(client, request_id, error)

    def _refuse(self, client: bytes, request_id: str, error: IsthmusError) -> None:
        log.warning("refused a control message", request_id=request_id, reason=str(error))
        param = getattr(error, "param", None)
        self._clients.send(client, [Failure(code=error.code, message=str(error), request_id=request_id, param=param)])

    def _status(self, ping: Ping) -> Status:
        """The answer to ``ping``, with what has changed in the prefix index since the client asked last."""
        if ping.index_version < 0:
            return self.status
        index = self._promised.prefixes.known.since(ping.index_version)
        return msgspec.structs.replace(self.status, index=index)

    def _welcome(self, hello: Hello) -> Welcome:
        require_protocol(hello.protocol)
        if hello.geometry is not None:
            require_same(self._geometry, hello.geometry)
        return Welcome(
            worker=self.name,
            geometry=self._geometry,
            landing=self._promised.form,
            codecs=codecs.landing_codecs(self._decode.cell_type, self._geometry),
            kv_endpoint=self._promised.kv_endpoint,
            num_cells=self._promised.admission.num_cells,
            sequence_cells=self._promised.admission.sequence_cells,
            max_sequences=self._promised.admission.max_sequences,
            pool_seed=self._promised.prefixes.seed,
        )

    def _take(self, client: bytes, reserve: Reserve) -> None:
        """Answer ``reserve``, at once or when KV for it has come from below RAM."""
        if self._draining.is_set():
            raise CapacityError("this decode worker is about to end and takes no new requests")
        if reserve.request_id in self._line:
            raise RequestError(f"request id {reserve.request_id!r} is in use", "request_id")
        self._promised.check(reserve)
        if not self._promised.fetching.begin(client, reserve):
            self._answer(client, reserve)

    def _answer(self, client: bytes, reserve: Reserve) -> None:
        """Send a ticket, or a place in the line of those that wait for room."""
        try:
            if not self._clients.send(client, [self._placed(client, reserve)]):
                self._give_up(client, reserve.request_id)
        except IsthmusError as error:
            self._refuse(client, reserve.request_id, error)

    def _placed(self, client: bytes, reserve: Reserve) -> Ticket | Queued:
        if not self._line:
            try:
                return self._promised.reserve(client, reserve)
            except CapacityError:
                if not self._decode.max_queued:
                    raise
        position = len(self._line)
        self._line.join(Waiting(client, reserve, time.monotonic_ns()))
        steps = self._promised.wait_steps([waiting.reserve for waiting in self._line])
        wait_ms = steps * self.engine.batching.meter.pace().step_ns // 1_000_000
        return Queued(request_id=reserve.request_id, position=position, wait_ms=wait_ms)

    def _serve_line(self) -> None:
        """Give tickets to those whose turn it is, and send away those whose time is over."""
        now = time.monotonic_ns()
        for waiting in self._line:
            if self._draining.is_set():
                self._turn_away(waiting, "this decode worker is about to end")
            elif now > waiting.deadline_ns:
                waited_s = (now - waiting.since_ns) / 1e9
                self._turn_away(waiting, f"there was no room on the decode worker for {waited_s:.1f} s")
        while self._may_move and (first := self._line.first()):
            request_id, left_ms = first.reserve.request_id, (first.deadline_ns - now) // 1_000_000
            reserve = msgspec.structs.replace(first.reserve, deadline_ms=left_ms)
            try:
                ticket = self._promised.reserve(first.client, reserve, now - first.since_ns)
            except CapacityError:
                self._may_move = False
                return
            except IsthmusError as error:
                self._line.leave(request_id)
                self._refuse(first.client, request_id, error)
                continue
            self._line.leave(request_id)
            if not self._clients.send(first.client, [ticket]):
                self.engine.abort(request_id)

    def _turn_away(self, waiting: Waiting, reason: str) -> None:
        self._leave_line(waiting.reserve.request_id)
        self._refuse(waiting.client, waiting.reserve.request_id, CapacityError(reason))

    def _leave_line(self, request_id: str) -> None:
        self._line.leave(request_id)
        self._may_move = True

    def _give_up(self, client: bytes, request_id: str) -> None:
        """The client of ``request_id`` is gone or no longer wants it."""
        if self._line.client(request_id) == client:
            self._leave_line(request_id)
        elif self._promised.client(request_id) == client:
            self.engine.abort(request_id)
        elif self._promised.fetching.client(request_id) == client:
            self._promised.fetching.forget(request_id)

    def _check_owner(self, client: bytes, request_id: str) -> None:
        if self._promised.client(request_id) != client:
            raise ProtocolError(f"request {request_id!r} is not known here; reserve it first")

    def _drop_silent_clients(self) -> None:
        for client in self._clients.gone():
            waiting = [waiting.reserve.request_id for waiting in self._line if waiting.client == client]
            for request_id in [*self._promised.of(client), *self._promised.fetching.of(client), *waiting]:
                log.warning("client is gone, its request with it", request_id=request_id)
                self._give_up(client, request_id)
