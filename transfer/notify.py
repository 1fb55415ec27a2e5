"""What systemd is told of a service that it started with ``Type=notify`` (sd_notify(3)); nothing without systemd."""

from __future__ import annotations

import os
import socket
import time

ALIVE_EVERY_NS = 1_000_000_000


class Supervisor:
    """``alive()`` in a service's loop: the first call says READY, later ones feed the watchdog once a second."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._ready = False
        self._due_ns = 0

    @property
    def listens(self) -> bool:
        """Whether anyone asked to be told."""
        return bool(self._address)

    def alive(self) -> None:
        """Say that the service answers now; costs one look at the clock where it was said a moment ago."""
        now_ns = time.monotonic_ns()
        if not self._address or now_ns < self._due_ns:
            return
        self._due_ns = now_ns + ALIVE_EVERY_NS
        self._send(b"WATCHDOG=1" if self._ready else b"READY=1")
        self._ready = True

    def _send(self, state: bytes) -> None:
        # A leading @ stands for the abstract namespace.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.sendto(state, address)
