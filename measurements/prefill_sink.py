"""A place where exported KV lands: the decode worker's receiver and landing buffers, without an engine."""

from __future__ import annotations

import secrets
import threading
import time
from pathlib import Path

import zmq

from cpu_decode.landing import LandingPlace, LandingPool, LandingReport
from cpu_decode.state import ChunkState, state_bytes
from transfer import keys
from transfer.config import Cluster
from transfer.doorkeeper import Doorkeeper
from transfer.errors import IsthmusError, LinkError
from transfer.geometry import KVGeometry
from transfer.messages import Landing, Ticket
from transfer.receiver import KVReceiver

DEADLINE_S = 60.0
POLL_MS = 20


class Sink:
    """Receives in a thread of its own, into f16 buffers that are free again as soon as they are full."""

    def __init__(self, cluster: Cluster, geometry: KVGeometry) -> None:
        self._geometry, self._link = geometry, cluster.link
        server = keys.server(Path(cluster.keys.dir))
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._doorkeeper = Doorkeeper(self._context, server)
        self._receiver = KVReceiver(
            self._context,
            "127.0.0.1",
            geometry,
            frame_bytes=cluster.link.frame_mib << 20,
            seal=cluster.link.seal,
            keys=server,
        )
        buffers = cluster.link.credit_chunks + 1
        max_bytes = buffers * state_bytes(geometry, cluster.link.chunk_tokens, "f16")
        self._pool = LandingPool(geometry, "f16", cluster.link.chunk_tokens, max_bytes)
        self._place: LandingPlace | None = None
        self._outcome: LandingReport | IsthmusError | None = None
        # The receiver belongs to the thread that holds this.
        self._turn = threading.Lock()
        self._over = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="sink", daemon=True)
        self._thread.start()

    def expect(self, num_tokens: int) -> Ticket:
        """A ticket for a prompt of ``num_tokens``; one at a time."""
        granted = self._link.credit_chunks

        def landed(chunk: ChunkState) -> None:
            nonlocal granted
            granted += 1
            self._pool.give_back(chunk.buffer)
            place.credit_chunks = granted
            self._receiver.grant(ticket.ticket, granted)

        place = LandingPlace(
            self._geometry,
            "f16",
            "raw",
            self._pool,
            num_tokens=num_tokens,
            chunk_tokens=self._link.chunk_tokens,
            credit_chunks=granted,
            on_chunk=landed,
            on_end=self._end,
            on_fail=self._end,
        )
        ticket = Ticket(
            request_id="measure",
            ticket=secrets.token_hex(16),
            kv_endpoint=f"tcp://127.0.0.1:{self._receiver.port}",
            codec="raw",
            landing=Landing(cell_type="f16", rope_order="half"),
            chunk_tokens=self._link.chunk_tokens,
            credit_chunks=granted,
            deadline_ms=int(DEADLINE_S * 1000),
        )
        self._over.clear()
        with self._turn:
            self._receiver.expect(ticket.ticket, place, granted)
        return ticket

    def stages(self) -> dict[str, int]:
        """Wait for the prompt that is expected; what its sender spent. Raises :class:`LinkError` if it is late."""
        if not self._over.wait(DEADLINE_S):
            raise LinkError(f"the prompt's KV did not land within {DEADLINE_S:.0f} s")
        if isinstance(self._outcome, IsthmusError):
            raise self._outcome
        sender = self._outcome.sender if self._outcome else None
        return {
            "gather_ns": sender.gather_ns if sender else 0,
            "encode_ns": sender.encode_ns if sender else 0,
            "kv_wire_bytes": sender.kv_wire_bytes if sender else 0,
        }

    def close(self) -> None:
        """Stop receiving."""
        self._closing.set()
        self._thread.join()
        self._receiver.close()
        self._doorkeeper.close()
        self._context.term()

    def _end(self, outcome: LandingReport | IsthmusError) -> None:
        self._outcome = outcome
        self._over.set()

    def _serve(self) -> None:
        poller = zmq.Poller()
        for socket in (self._receiver.control, self._receiver.frames):
            poller.register(socket, zmq.POLLIN)
        while not self._closing.is_set():
            if poller.poll(POLL_MS):
                with self._turn:
                    self._receiver.turn()
            else:
                time.sleep(0)
