"""Where decode workers say that they are there: a ROUTER that only listens."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog
import zmq
import zmq.asyncio

from transfer.errors import ConfigError, ProtocolError
from transfer.keys import ClientKeys, secure_client
from transfer.listen import bind
from transfer.messages import Announce, decode_to_registry, require_protocol

MAX_ANNOUNCE_BYTES = 4096
LOG_EVERY_S = 1.0

log = structlog.get_logger()


class Registry:
    """Hands what workers announce on ``port`` of ``host`` to ``heard``.

    With ``keys`` whoever connects must hold the workers' key. Raises :class:`ConfigError` if the port is taken.
    """

    def __init__(self, host: str, port: int, keys: ClientKeys | None, heard: Callable[[Announce], None]) -> None:
        self._heard = heard
        self._logged_ns = 0
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.maxmsgsize = MAX_ANNOUNCE_BYTES
        if keys is not None:
            secure_client(self._socket, keys)
        try:
            bind(self._socket, host, port, "[proxy] registry_port")
        except ConfigError:
            self._context.destroy(linger=0)
            raise

    async def run(self) -> None:
        """Listen until cancelled."""
        try:
            while True:
                _, *parts = await self._socket.recv_multipart()
                try:
                    self._heard(_read(parts))
                except ProtocolError as error:
                    self._complain(error)
        finally:
            self._context.destroy(linger=0)

    def _complain(self, error: ProtocolError) -> None:
        now = time.monotonic_ns()
        if now - self._logged_ns > LOG_EVERY_S * 1e9:
            self._logged_ns = now
            log.warning("what a decode worker announces is of no use", reason=str(error))


def _read(parts: list[bytes]) -> Announce:
    if len(parts) != 1:
        raise ProtocolError(f"an announcement has one part, not {len(parts)}")
    announce = decode_to_registry(parts[0])
    require_protocol(announce.protocol)
    return announce
