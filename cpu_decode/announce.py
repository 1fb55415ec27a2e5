"""Tells a proxy's registry that this worker is there."""

from __future__ import annotations

import time

import zmq

from transfer.keys import ServerKeys, secure_server
from transfer.messages import Announce, encode

ANNOUNCE_S = 1.0
_RECONNECT_MS = 1000


class Announcer:
    """One DEALER to the registry at ``endpoint``; used by the worker's I/O thread, never waits.

    With ``keys`` it is the CURVE server although it connects, so that workers and proxies need the same keys as on the
    control plane; ``context`` has its doorkeeper then.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: ServerKeys | None) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        # Old news is no news: nothing is kept for a proxy that is away.
        self.socket.sndhwm = 1
        self.socket.immediate = True
        self.socket.reconnect_ivl = _RECONNECT_MS
        if keys:
            secure_server(self.socket, keys, "proxy")
        self.socket.connect(endpoint)
        self._said_ns = 0
        self._said: Announce | None = None

    def turn(self, announce: Announce) -> None:
        """Say ``announce`` if it is news, or the last word is a second old."""
        now = time.monotonic_ns()
        if announce == self._said and now - self._said_ns < ANNOUNCE_S * 1e9:
            return
        try:
            self.socket.send(encode(announce), zmq.NOBLOCK)
        except zmq.Again:
            return
        self._said, self._said_ns = announce, now

    def close(self) -> None:
        """Stop talking."""
        self.socket.close()
