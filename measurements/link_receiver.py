"""The serving process of ``isthmus measure link``: receives what it is ordered to, and says what that cost.

It lands KV as the decode worker does, but injects nothing: the buffer of a complete chunk is free at once.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import structlog
import zmq

from cpu_decode.landing import LandingPlace, LandingPool, LandingReport
from cpu_decode.state import ChunkState
from measurements import iperf, memory_peak
from measurements.link_orders import (
    MAX_LANDING_TOKENS,
    MAX_ORDER_BYTES,
    PATIENCE_S,
    VERSION,
    Answer,
    Await,
    Done,
    Expecting,
    Greet,
    Greeted,
    Leave,
    Listening,
    Order,
    Receive,
    ReceiveBare,
    Refused,
    ServeIperf,
    decode_order,
    encode,
)
from measurements.link_synthetic import GEOMETRY, TOKEN_BYTES
from transfer import codecs, keys
from transfer.config import Link
from transfer.doorkeeper import Doorkeeper
from transfer.errors import CapacityError, ConfigError, IsthmusError, LinkError, ProtocolError
from transfer.listen import bind
from transfer.messages import Landing, Ticket
from transfer.receiver import KVReceiver
from transfer.seal import SealName

log = structlog.get_logger()

# Nobody has given an order for so long that nobody will.
IDLE_S = 600.0
POLL_MS = 1000
FRAME_BYTES = Link().frame_mib << 20


class Task:
    """What was ordered last, until it has come: ``answer`` is set then. ``stop`` gives back what it holds."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self.stop = stop
        self.answer: Done | Refused | None = None
        self.until_ns = time.monotonic_ns() + int(PATIENCE_S * 1e9)
        self._cpu_began_ns = time.process_time_ns()

    @property
    def cpu_ns(self) -> int:
        """CPU time of this process since the order, all threads, user and kernel."""
        return time.process_time_ns() - self._cpu_began_ns


def serve(host: str, port: int) -> None:
    """Serve one run, from Greet to Leave or until nobody has spoken for ``IDLE_S``; ConfigError if it cannot listen."""
    with tempfile.TemporaryDirectory() as folder:
        agent = ReceivingAgent(host, port, Path(folder))
        try:
            agent.run()
        finally:
            agent.close()


class ReceivingAgent:
    """Owns the orders' socket and one :class:`KVReceiver` for each seal; everything runs on the thread of ``run``."""

    def __init__(self, host: str, port: int, folder: Path) -> None:
        keys.make(folder)
        self._keys = keys.server(folder)
        self._host = host
        self._client = keys.client(folder, "prefill")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._orders = self._context.socket(zmq.REP)
        self._orders.maxmsgsize = MAX_ORDER_BYTES
        self._orders.linger = 1000
        try:
            bind(self._orders, host, port, "--serve")
        except ConfigError:
            self._context.term()
            raise
        self._doorkeeper = Doorkeeper(self._context, self._keys)
        self._receivers: dict[SealName, KVReceiver] = {}
        self._by_socket: dict[zmq.Socket[bytes], KVReceiver] = {}
        self._bare = self._context.socket(zmq.PULL)
        self._bare.rcvhwm = 8
        self._bare.maxmsgsize = FRAME_BYTES
        self._bare_port = self._bare.bind_to_random_port(f"tcp://{host}")
        self._bare_left = 0
        self._bare_copy = np.empty(0, np.uint8)
        self._poller = zmq.Poller()
        for source in (self._orders, self._bare):
            self._poller.register(source, zmq.POLLIN)
        self._pool: tuple[int, LandingPool] | None = None
        self._task: Task | None = None
        self._awaited = self._left = False

    def run(self) -> None:
        """Serve until the peer leaves or falls silent."""
        heard_ns = time.monotonic_ns()
        while not self._left:
            ready = dict(self._poller.poll(POLL_MS))
            for receiver in {self._by_socket[s] for s in ready if s in self._by_socket}:
                receiver.turn()
            if self._bare in ready:
                self._take_bare()
            if self._orders in ready:
                heard_ns = time.monotonic_ns()
                self._listen()
            self._expire()
            self._answer_awaited()
            if time.monotonic_ns() - heard_ns > IDLE_S * 1e9:
                log.info("nobody has given an order for a long time", idle_s=IDLE_S)
                return

    def close(self) -> None:
        """Give everything back."""
        self._abandon()
        self._orders.close()
        self._bare.close(linger=0)
        for receiver in self._receivers.values():
            receiver.close()
        self._doorkeeper.close()
        self._context.term()

    def _listen(self) -> None:
        parts = self._orders.recv_multipart(zmq.NOBLOCK)
        answer: Answer | None
        try:
            if len(parts) != 1:
                raise ProtocolError(f"an order has one part, not {len(parts)}")
            answer = self._obey(decode_order(parts[0]))
        except IsthmusError as error:
            log.warning("refused an order", reason=str(error))
            answer = Refused(reason=str(error))
        if answer is not None:
            self._orders.send(encode(answer))

    def _obey(self, order: Order) -> Answer | None:
        match order:
            case Greet():
                if order.version != VERSION:
                    raise ProtocolError(f"version of the orders is {VERSION} here, {order.version} there")
                return Greeted(**self._client._asdict(), has_iperf3=iperf.is_installed())
            case Receive():
                return self._expect(order)
            case ReceiveBare():
                return self._expect_bare(order)
            case ServeIperf():
                return self._serve_iperf()
            case Await():
                if self._task is None:
                    raise ProtocolError("there is nothing to wait for")
                self._awaited = True
                return None
            case Leave():
                self._left = True
                return Done(cpu_ns=0)

    def _answer_awaited(self) -> None:
        if self._awaited and self._task is not None and self._task.answer is not None:
            self._orders.send(encode(self._task.answer))
            self._awaited, self._task = False, None

    def _expire(self) -> None:
        task = self._task
        if task is not None and task.answer is None and time.monotonic_ns() > task.until_ns:
            task.stop()
            task.answer = Refused(reason=f"what was ordered did not come within {PATIENCE_S:.0f} s")

    def _abandon(self) -> None:
        """A new order forgets the one before it."""
        if self._task is not None:
            self._task.stop()
            self._task = None

    def _expect(self, order: Receive) -> Expecting:
        self._abandon()
        codecs.for_cells(order.codec, "bf16", GEOMETRY)
        if order.chunk_tokens * order.credit_chunks > MAX_LANDING_TOKENS:
            raise CapacityError(
                f"{order.credit_chunks} chunks of {order.chunk_tokens} tokens are over the limit of "
                f"{MAX_LANDING_TOKENS} tokens in flight"
            )
        receiver, pool = self._receiver_for(order.seal), self._pool_for(order)
        ticket = Ticket(
            request_id=f"{order.codec} {order.seal}",
            ticket=secrets.token_hex(16),
            kv_endpoint=f"tcp://{self._host}:{receiver.port}",
            codec=order.codec,
            landing=Landing(cell_type="bf16", rope_order="half"),
            chunk_tokens=order.chunk_tokens,
            credit_chunks=order.credit_chunks,
            deadline_ms=int(PATIENCE_S * 1000),
        )
        most_in_use = 0
        before_bytes = memory_peak.restart()

        def landed(chunk: ChunkState) -> None:
            nonlocal most_in_use
            most_in_use = max(most_in_use, pool.in_use)
            pool.give_back(chunk.buffer)
            place.credit_chunks += 1
            receiver.grant(ticket.ticket, place.credit_chunks)

        def ended(report: LandingReport) -> None:
            task.answer = Done(
                cpu_ns=task.cpu_ns,
                encode_ns=report.sender.encode_ns,
                wire_ns=report.wire_ns,
                decode_frame_ns=report.decode_frame_ns,
                kv_wire_bytes=report.sender.kv_wire_bytes,
                landing_bytes=most_in_use * pool.buffer_bytes,
                grown_bytes=max(0, memory_peak.peak_bytes() - before_bytes),
            )

        def failed(error: IsthmusError) -> None:
            task.answer = Refused(reason=str(error))

        def stop() -> None:
            receiver.cancel(ticket.ticket, "the order was given up")
            place.release()

        place = LandingPlace(
            GEOMETRY,
            "bf16",
            order.codec,
            pool,
            num_tokens=order.num_tokens,
            chunk_tokens=order.chunk_tokens,
            credit_chunks=order.credit_chunks,
            on_chunk=landed,
            on_end=ended,
            on_fail=failed,
        )
        receiver.expect(ticket.ticket, place, order.credit_chunks)
        task = self._task = Task(stop)
        return Expecting(ticket=ticket)

    def _receiver_for(self, seal: SealName) -> KVReceiver:
        """Made when first asked for: one that is only asked for bare messages stays a bare ZeroMQ program."""
        if seal not in self._receivers:
            receiver = self._receivers[seal] = KVReceiver(
                self._context, self._host, GEOMETRY, frame_bytes=FRAME_BYTES, seal=seal, keys=self._keys
            )
            for source in (receiver.control, receiver.frames):
                self._by_socket[source] = receiver
                self._poller.register(source, zmq.POLLIN)
        return self._receivers[seal]

    def _pool_for(self, order: Receive) -> LandingPool:
        """The buffers of the last transfer, if they fit: their pages are there already, as in a worker that has run."""
        if self._pool is None or self._pool[0] != order.chunk_tokens or order.fresh:
            # The old pages go back first.
            self._pool = None
            pool = LandingPool(GEOMETRY, "bf16", order.chunk_tokens, 2 * MAX_LANDING_TOKENS * TOKEN_BYTES)
            self._pool = order.chunk_tokens, pool
        return self._pool[1]

    def _expect_bare(self, order: ReceiveBare) -> Listening:
        self._abandon()
        if self._bare_left:
            raise LinkError(f"{self._bare_left} bare messages of an earlier order are still to come")

        def stop() -> None:
            self._bare_left = 0

        self._bare_left = order.messages
        self._bare_copy = np.empty(FRAME_BYTES if order.copied else 0, np.uint8)
        self._task = Task(stop)
        return Listening(port=self._bare_port)

    def _take_bare(self) -> None:
        while True:
            try:
                parts = self._bare.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._bare_left = max(0, self._bare_left - 1)
            if self._bare_copy.size and len(parts) == 2:
                payload = np.frombuffer(parts[1].buffer, np.uint8)
                np.copyto(self._bare_copy[: payload.size], payload)
            if self._bare_left == 0 and self._task is not None:
                self._task.answer = self._task.answer or Done(cpu_ns=self._task.cpu_ns)

    def _serve_iperf(self) -> Listening:
        self._abandon()
        server = iperf.Server(self._host)
        self._task = Task(server.stop)
        return Listening(port=server.port)
