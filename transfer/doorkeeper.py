"""Who may come in: answers ZeroMQ's authentication requests (RFC 27, ZAP) and logs who was turned away."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict

import structlog
import zmq
import zmq.asyncio
from zmq.auth import Authenticator
from zmq.utils.monitor import parse_monitor_message

from transfer.errors import ConfigError
from transfer.keys import ServerKeys, allow_list

log = structlog.get_logger()

# Peers that fail before they show a key: another mechanism, another server key, garbage. Their address is not told.
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
LOG_EVERY_S = 1.0
# Keys that are added to the folder, or taken out, count for connections made this much later.
READ_EVERY_S = 1.0
# Domain of the sockets that take sealed frames: they ask for no key, but for an address from which one was shown.
FRAMES_DOMAIN = b"frames"
MAX_ADDRESSES = 1024


class Doorkeeper(Authenticator):
    """One for a context, in a thread of its own, from before its first secured socket is bound until closed.

    ``refused`` counts the connections that were turned away; at most one a second is logged.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: ServerKeys) -> None:
        super().__init__(context)
        self.refused = 0
        self._folder, self._holders = keys.folder, keys.allowed
        self._read_ns = time.monotonic_ns()
        self._address = ""
        self._frames_from: OrderedDict[str, None] = OrderedDict()
        self._logged_ns = 0
        self._monitors: list[zmq.Socket[bytes]] = []
        for role in keys.allowed:
            self.configure_curve_callback(role, credentials_provider=self)
        self.start()
        endpoint = f"inproc://doorkeeper-{id(self)}"
        self._bell, self._heard = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        self._bell.bind(endpoint)
        self._heard.connect(endpoint)
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),), name="doorkeeper", daemon=True)
        self._thread.start()

    def watch(self, socket: zmq.Socket[bytes]) -> None:
        """Also log who fails at secured ``socket`` before showing a key; called by the thread that owns it."""
        self._monitors.append(socket.get_monitor_socket(_FAILED))
        self._bell.send(b"watch")

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether the holder of public key ``key`` (Z85) may come in; called by the base class."""
        self._read_again()
        known = {role: names[key] for role, names in self._holders.items() if key in names}
        if domain in known:
            if domain == "prefill":
                self._frames_from[self._address] = None
                if len(self._frames_from) > MAX_ADDRESSES:
                    self._frames_from.popitem(last=False)
            return True
        self._refuse(
            "its key is not allowed here",
            address=self._address,
            key=key.decode(),
            holder=next(iter(known.values()), "unknown"),
        )
        return False

    async def handle_zap_message(self, msg: list[bytes]) -> None:
        """Answer one request: version, request id, domain, address, identity, mechanism, credentials."""
        self._address = msg[3].decode(errors="replace") if len(msg) > 3 else ""
        if len(msg) > 3 and msg[2] == FRAMES_DOMAIN:
            # ZeroMQ holds a message of endless parts in memory before anyone can look at its seal.
            if self._address in self._frames_from:
                self._send_zap_reply(msg[1], b"200", b"OK")
            else:
                self._refuse("no prefill node has shown its key from there", address=self._address)
                self._send_zap_reply(msg[1], b"400", b"say hello first")
            return
        await super().handle_zap_message(msg)

    def close(self) -> None:
        """Stop answering; call after the secured sockets are closed and before the context is terminated."""
        self._bell.send(b"close")
        self._thread.join()
        self._bell.close()
        self.stop()

    async def _serve(self) -> None:
        poller = zmq.asyncio.Poller()
        poller.register(self._heard, zmq.POLLIN)
        poller.register(self.zap_socket, zmq.POLLIN)
        watched = 0
        try:
            while True:
                for socket, _ in await poller.poll():
                    parts = socket.recv_multipart()
                    if socket is self.zap_socket:
                        await self.handle_zap_message(parts)
                    elif socket is not self._heard:
                        self._failed(socket, parts, poller)
                    elif parts == [b"close"]:
                        return
                for monitor in self._monitors[watched:]:
                    poller.register(monitor, zmq.POLLIN)
                    watched += 1
        finally:
            self._heard.close(linger=0)
            for monitor in self._monitors:
                monitor.close(linger=0)

    def _read_again(self) -> None:
        """Take in changes of the key folder; one that cannot be read changes nothing."""
        now = time.monotonic_ns()
        if now - self._read_ns < READ_EVERY_S * 1e9:
            return
        self._read_ns = now
        try:
            self._holders = allow_list(self._folder)
        except ConfigError as error:
            log.warning("the allowed keys cannot be read again", reason=str(error))

    def _failed(self, monitor: zmq.Socket[bytes], parts: list[bytes], poller: zmq.asyncio.Poller) -> None:
        event = parse_monitor_message(parts)
        if event["event"] == zmq.EVENT_MONITOR_STOPPED:
            poller.unregister(monitor)
        else:
            self._refuse("it does not speak CURVE with our key", socket=event["endpoint"].decode())

    def _refuse(self, reason: str, **details: str) -> None:
        self.refused += 1
        now = time.monotonic_ns()
        if now - self._logged_ns > LOG_EVERY_S * 1e9 or self.refused == 1:
            self._logged_ns = now
            log.warning("turned a peer away", reason=reason, turned_away=self.refused, **details)
