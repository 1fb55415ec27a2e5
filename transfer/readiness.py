"""Whether a ZeroMQ socket can be read or written now."""

from __future__ import annotations

from typing import Any

import zmq

# As a number: PyZMQ looks enums up.
_EVENTS = int(zmq.EVENTS)


def is_ready(socket: zmq.Socket[Any], event: int) -> bool:
    """Whether ``event``, ``zmq.POLLIN`` or ``zmq.POLLOUT``, holds for ``socket``.

    Asks the socket itself: ``Socket.poll`` makes a poller, and a receive that finds nothing an exception, which costs
    more than the rest of a frame's bookkeeping.
    """
    return bool(int(socket.getsockopt(_EVENTS)) & event)
