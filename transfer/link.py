"""The prefill node's way to one decode worker: a control socket, a frames socket, and the session between them."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

import msgspec
import structlog
import zmq

from transfer import frames
from transfer.codecs import CODECS
from transfer.errors import LinkError
from transfer.geometry import KVGeometry
from transfer.keys import ClientKeys, secure_client
from transfer.layout import Payload
from transfer.messages import (
    Cancel,
    Credit,
    Failure,
    Landed,
    Resend,
    SenderHello,
    SenderWelcome,
    decode_from_receiver,
    encode,
    require_protocol,
)
from transfer.outgoing import Unsealed
from transfer.readiness import is_ready
from transfer.seal import NAMES, Seal, Sealer
from transfer.shares import Share

log = structlog.get_logger()

Frame = tuple[Payload, ...]
Word = Credit | Resend | Landed | Cancel

# A worker takes frames as fast as it can land them; more in ZeroMQ's queue would only hold memory.
SEND_HIGH_WATER_MARK_FRAMES = 4
RECEIVE_HIGH_WATER_MARK_MESSAGES = 1000
MAX_FAREWELLS = 1000
# A hello that was lost is said again.
HELLO_AGAIN_S = 1.0
# ZeroMQ never asks again where a key was refused, but the key may have been admitted since.
CONNECT_AGAIN_S = 5.0
RECONNECT_MS, MAX_RECONNECT_MS = 100, 1000
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 1000, 5000


class Link:
    """Nothing is sent before the worker, as it is now, has welcomed this sender."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        geometry: KVGeometry,
        share: Share | None,
        keys: ClientKeys | None,
    ) -> None:
        self.endpoint = endpoint
        self.used_ns = time.monotonic_ns()
        self._hello = SenderHello(geometry=geometry, codecs=tuple(CODECS), share=share)
        self._helloed_ns = self._connected_ns = 0
        self._awaiting_welcome = False
        self._session: SenderWelcome | None = None
        self._sealer: Sealer | None = None
        # ABORTs of transfers that are gone already; without them their receivers would wait for the deadline.
        self._farewells: deque[Unsealed] = deque(maxlen=MAX_FAREWELLS)
        self._secure = keys is not None
        self.control = context.socket(zmq.DEALER)
        # The worker knows this sender again after a reconnect.
        self.control.routing_id = b"s" + secrets.token_bytes(15)
        self.control.sndhwm = self.control.rcvhwm = RECEIVE_HIGH_WATER_MARK_MESSAGES
        self.frames = context.socket(zmq.PUSH)
        self.frames.sndhwm = SEND_HIGH_WATER_MARK_FRAMES
        for socket in (self.control, self.frames):
            socket.linger = 0
            socket.reconnect_ivl, socket.reconnect_ivl_max = RECONNECT_MS, MAX_RECONNECT_MS
            socket.heartbeat_ivl, socket.heartbeat_timeout = HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS
        try:
            if keys is not None:
                secure_client(self.control, keys)
            self.control.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise LinkError(f"cannot connect to {endpoint}: {error}") from None

    @property
    def open(self) -> bool:
        """Whether frames may be sent: the last hello has been answered."""
        return self._session is not None and not self._awaiting_welcome

    @property
    def writable(self) -> bool:
        """Whether the frames socket takes another frame now."""
        return is_ready(self.frames, zmq.POLLOUT)

    @property
    def has_farewell(self) -> bool:
        """Whether an ABORT waits to be sent."""
        return self.open and bool(self._farewells)

    @property
    def max_frame_bytes(self) -> int:
        """Elements that the worker takes in one frame."""
        return self._session.max_frame_bytes if self._session else 0

    def hello(self, *, renew: bool = False) -> None:
        """Introduce this sender, at most once a second while no answer comes."""
        now = self.used_ns = time.monotonic_ns()
        if self._awaiting_welcome and now - self._helloed_ns < HELLO_AGAIN_S * 1e9:
            return
        if not self._awaiting_welcome:
            self._connected_ns = now
        elif now - self._connected_ns > CONNECT_AGAIN_S * 1e9:
            with suppress(zmq.ZMQError):
                self.control.disconnect(self.endpoint)
            self.control.connect(self.endpoint)
            self._connected_ns = now
        try:
            self.control.send(encode(msgspec.structs.replace(self._hello, renew=renew)), zmq.NOBLOCK)
        except zmq.Again:
            log.info("hello could not be queued", endpoint=self.endpoint)
        self._awaiting_welcome, self._helloed_ns = True, now

    def bid_farewell(self, abort: Unsealed) -> None:
        """Send an ABORT when the link next takes one."""
        self._farewells.append(abort)
        self.flush()

    def flush(self) -> None:
        """Send the ABORTs that wait, as far as the link takes them."""
        while self.has_farewell and self.send(self._farewells[0]):
            self._farewells.popleft()

    def send(self, frame: Unsealed) -> int:
        """Seal a frame and hand it to the socket without waiting; the bytes it takes on the wire, 0 if it takes none.

        A session whose counters are used up asks for the next one first.
        """
        if not self.writable:
            return 0
        if self._sealer is not None and self._sealer.exhausted:
            self.hello(renew=True)
            return 0
        parts = self._wrap(frame)
        try:
            self.frames.send_multipart(parts, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return 0
        self.used_ns = time.monotonic_ns()
        return sum(map(len, parts))

    def _wrap(self, frame: Unsealed) -> Frame:
        header, payload = frame
        session = self._session.session if self._session else 0
        if self._sealer is None:
            header = msgspec.structs.replace(header, session=session)
            return frames.pack(header, len(payload), frames.checksum(payload)), payload
        header = msgspec.structs.replace(header, session=session, seal=self._sealer.mode)
        counter = self._sealer.take_counter()
        head = frames.pack(header, len(payload), counter)
        return head, *self._sealer.seal(counter, head, payload)

    def words(self) -> Iterator[Word]:
        """What the worker has said since the last call.

        Raises :class:`LinkError` if it refuses this sender, :class:`ProtocolError` if it cannot be understood.
        """
        while is_ready(self.control, zmq.POLLIN):
            message = decode_from_receiver(self.control.recv(zmq.NOBLOCK))
            match message:
                case SenderWelcome():
                    self._begin(message)
                case Failure():
                    raise LinkError(f"refused this sender: {message.message}")
                case _:
                    yield message

    def _begin(self, welcome: SenderWelcome) -> None:
        require_protocol(welcome.protocol)
        if welcome.share != self._hello.share:
            raise LinkError("the worker cannot put KV of several ranks together; upgrade it to this release")
        self._awaiting_welcome = False
        if welcome == self._session:
            return
        seal = NAMES[welcome.seal]
        if seal is not Seal.NONE and not self._secure:
            raise LinkError("the worker seals KV frames under a key that came in the clear: set [keys] dir on both")
        # Connected anew for each session: a worker that was restarted has refused the old connection for good.
        host = urlsplit(self.endpoint).hostname
        if self._session is not None:
            self.frames.disconnect(f"tcp://{host}:{self._session.frames_port}")
        self.frames.connect(f"tcp://{host}:{welcome.frames_port}")
        self._session = welcome
        self._sealer = Sealer(welcome.key, seal) if seal is not Seal.NONE else None

    def close(self, linger_ms: int = 0) -> None:
        """Close both sockets; what the frames socket holds gets ``linger_ms`` to leave."""
        self.control.close()
        self.frames.close(linger=linger_ms)
