"""The proxies that a worker talks to: one control socket, and when each of them was last heard."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import structlog
import zmq

from transfer.config import Decode
from transfer.keys import ServerKeys, secure_server
from transfer.listen import bind
from transfer.messages import MAX_MESSAGE_BYTES, FromWorker, encode
from transfer.readiness import is_ready

log = structlog.get_logger()

MESSAGES_PER_TURN = 64
# Numbers, and no send_multipart: between two steps PyZMQ's enums and checks take as long as sending.
_SEND_MORE, _SEND_LAST = int(zmq.SNDMORE | zmq.NOBLOCK), int(zmq.NOBLOCK)
# A proxy pings every second; one that is silent this long is gone, and its requests with it.
CLIENT_SILENCE_S = 10.0


class Clients:
    """Their messages in, ours out; :meth:`close` it.

    The I/O thread hears, any thread may :meth:`send`: tokens leave from the engine's, for waking another to send them
    takes longer. So the socket has a lock, and is not polled itself: who sends may come to know of messages, which
    ``descriptor`` then does not show any more, and calls ``wake``.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        decode: Decode,
        keys: ServerKeys | None,
        wake: Callable[[], None],
    ) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.maxmsgsize = MAX_MESSAGE_BYTES
        self.socket.sndhwm = self.socket.rcvhwm = 10_000
        self.socket.linger = 200
        self.socket.router_mandatory = True
        if keys:
            secure_server(self.socket, keys, "proxy")
        bind(self.socket, decode.host, decode.control_port, "[decode] control_port")
        self.descriptor = int(self.socket.get(zmq.FD))
        self._lock = threading.Lock()
        self._wake = wake
        self._heard_ns: dict[bytes, int] = {}

    @property
    def port(self) -> int:
        """The TCP port that the socket is bound to."""
        return int(self.socket.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])

    def heard(self) -> Iterator[tuple[bytes, list[bytes]]]:
        """Who has said something, and the parts of it: what waits now, at most ``MESSAGES_PER_TURN``.

        To be taken to its end: ``descriptor`` shows what comes after that only.
        """
        for _ in range(MESSAGES_PER_TURN):
            with self._lock:
                if not is_ready(self.socket, zmq.POLLIN):
                    return
                client, *parts = self.socket.recv_multipart(zmq.NOBLOCK)
            self._heard_ns[client] = time.monotonic_ns()
            yield client, parts
        self._wake()

    def send(self, client: bytes, messages: Sequence[FromWorker]) -> bool:
        """Queue ``messages``, each a part of one; False, and none is, if the client is gone or has stopped reading.

        However many parts a message has, it wakes either end once.
        """
        *parts, last = [client, *map(encode, messages)]
        with self._lock:
            try:
                for part in parts:
                    self.socket.send(part, _SEND_MORE)
                self.socket.send(last, _SEND_LAST)
            except zmq.ZMQError as error:
                request_id = getattr(messages[0], "request_id", "")
                # A client that only asked how we are may leave before it hears.
                say = log.warning if request_id else log.debug
                say("could not answer a client", request_id=request_id, reason=str(error))
                return False
            finally:
                # One that fails may have taken notice, too.
                if is_ready(self.socket, zmq.POLLIN):
                    self._wake()
        return True

    def gone(self) -> list[bytes]:
        """Those that have been silent for too long; each is named once."""
        oldest = time.monotonic_ns() - int(CLIENT_SILENCE_S * 1e9)
        silent = [client for client, heard_ns in self._heard_ns.items() if heard_ns < oldest]
        for client in silent:
            del self._heard_ns[client]
        return silent

    def close(self) -> None:
        """Close the socket; what is queued still leaves for a moment."""
        self.socket.close()
