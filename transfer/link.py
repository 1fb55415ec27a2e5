"""The prefill node's socket to one decode worker, and how far its handshake has come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import structlog
import zmq

from transfer.codecs import CODECS
from transfer.errors import LinkError
from transfer.geometry import KVGeometry
from transfer.messages import (
    Cancel,
    Credit,
    Failure,
    SenderHello,
    SenderWelcome,
    decode_from_receiver,
    encode,
    require_protocol,
)
from transfer.outgoing import Frame

log = structlog.get_logger()

# A worker takes frames as fast as it can land them; more in ZeroMQ's queue would only hold memory.
SEND_HIGH_WATER_MARK_FRAMES = 4
RECEIVE_HIGH_WATER_MARK_MESSAGES = 1000
MAX_FAREWELLS = 1000


class Link:
    """A DEALER socket. Nothing is sent before the worker, as it is now, has welcomed this sender."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, geometry: KVGeometry) -> None:
        self.endpoint = endpoint
        self.max_frame_bytes = 0
        self.used_ns = time.monotonic_ns()
        self._hello = encode(SenderHello(geometry=geometry, codecs=tuple(CODECS)))
        self._unanswered_hellos = 0
        # ABORTs of transfers that are gone already; without them their receivers would wait for the deadline.
        self._farewells: deque[Frame] = deque(maxlen=MAX_FAREWELLS)
        self.socket = context.socket(zmq.DEALER)
        self.socket.sndhwm = SEND_HIGH_WATER_MARK_FRAMES
        self.socket.rcvhwm = RECEIVE_HIGH_WATER_MARK_MESSAGES
        self.socket.linger = 0
        try:
            self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.socket.close()
            raise LinkError(f"cannot connect to {endpoint}: {error}") from None

    @property
    def welcome(self) -> bool:
        """Whether every hello has been answered."""
        return self._unanswered_hellos == 0

    @property
    def has_farewell(self) -> bool:
        """Whether an ABORT waits to be sent."""
        return self.welcome and bool(self._farewells)

    def hello(self) -> None:
        """Introduce this sender; said again for every transfer, since the worker may have been restarted."""
        self.used_ns = time.monotonic_ns()
        try:
            self.socket.send(self._hello, zmq.NOBLOCK)
        except zmq.Again:
            # Hellos or frames that wait already will be answered, or the transfer's deadline will tell.
            log.info("hello could not be queued", endpoint=self.endpoint)
        else:
            self._unanswered_hellos += 1

    def bid_farewell(self, frame: Frame) -> None:
        """Send an ABORT when the link next takes one."""
        self._farewells.append(frame)
        self.flush()

    def flush(self) -> None:
        """Send the ABORTs that wait, as far as the link takes them."""
        while self.has_farewell and self.send(self._farewells[0]):
            self._farewells.popleft()

    def send(self, frame: Frame) -> bool:
        """Hand a frame to the socket without waiting; False if it takes none now."""
        try:
            self.socket.send_multipart(frame, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        self.used_ns = time.monotonic_ns()
        return True

    def messages(self) -> Iterator[Credit | Cancel]:
        """What the worker has said since the last call.

        Raises :class:`LinkError` if it refuses this sender, :class:`ProtocolError` if it cannot be understood.
        """
        while self.socket.poll(0, zmq.POLLIN):
            message = decode_from_receiver(self.socket.recv(zmq.NOBLOCK))
            match message:
                case SenderWelcome():
                    require_protocol(message.protocol)
                    self.max_frame_bytes = message.max_frame_bytes
                    self._unanswered_hellos = max(0, self._unanswered_hellos - 1)
                case Failure():
                    raise LinkError(f"refused this sender: {message.message}")
                case Credit() | Cancel():
                    yield message
