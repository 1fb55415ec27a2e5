"""Binding a ZeroMQ socket, with an error that names the key to change."""

from __future__ import annotations

from typing import Any

import zmq

from transfer.errors import ConfigError


def bind(socket: zmq.Socket[Any], host: str, port: int, key: str) -> None:
    """Bind ``socket`` to TCP ``port`` of ``host``, 0 for a port of the system's choice.

    Raises :class:`ConfigError` that names ``key``, the port's place in the cluster file, if the port is taken or the
    host is not this one. The socket is closed then.
    """
    try:
        socket.bind(f"tcp://{host}:{port or '*'}")
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise ConfigError(f"cannot listen on {host}:{port} ({error}); change {key} or free the port") from None
