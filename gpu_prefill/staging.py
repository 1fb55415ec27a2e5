"""A bounded way off the device: the engine's thread queues work and goes on, another hands over what has come.

Slots on the device are used in turn. One that is used again waits, on the device, for its last copy to the host; so the
engine's thread may queue a whole step ahead, and a slow bus slows computing in place of filling memory. Memory on the
host is freed by whoever holds its bytes last, the sender or a socket; where too little is left, :meth:`Staging.stage`
says so and only that transfer fails.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import structlog

from gpu_prefill.arena import ALIGNMENT_BYTES, Arena
from gpu_prefill.encode import VERDICT_BYTES
from gpu_prefill.streams import Mark, Streams
from transfer.layout import Bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = structlog.get_logger()

DEVICE_SLOTS = 16


class Staged(NamedTuple):
    """What has come to the host: ``payload`` is uint8, and ``refused`` whether its codec refuses what it was made of.

    ``filled_ns`` and ``copied_ns`` are the device's times of making it and of copying it.
    """

    payload: Bytes
    refused: bool
    filled_ns: int
    copied_ns: int


Deliver = Callable[[Staged], None]


class _OnItsWay(NamedTuple):
    offset: int
    payload_bytes: int
    began: Mark
    filled: Mark
    copied: Mark
    deliver: Deliver


class Staging:
    """``DEVICE_SLOTS`` slots for payloads of up to ``slot_bytes`` on ``device``, and ``host_bytes`` on the host."""

    def __init__(self, streams: Streams, device: torch.device, *, slot_bytes: int, host_bytes: int) -> None:
        import torch

        self._streams = streams
        self.to_device = streams.to_device
        self._slot_bytes = slot_bytes
        self.host_bytes = host_bytes
        stride_bytes = -(-(slot_bytes + VERDICT_BYTES) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self._device = torch.empty((DEVICE_SLOTS, stride_bytes), dtype=torch.uint8, device=device)
        self._copied: list[Mark | None] = [None] * DEVICE_SLOTS
        self._turn = 0
        self._host = streams.host_memory(host_bytes)
        self._arena = Arena(host_bytes)
        self._on_their_way: queue.SimpleQueue[_OnItsWay | Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._hand_over, name="isthmus-staging", daemon=True)
        self._thread.start()

    @property
    def used_bytes(self) -> int:
        """Host memory that is taken; for the engine's thread."""
        return self._arena.used_bytes

    def stage(self, payload_bytes: int, fill: Callable[[Tensor], None], deliver: Deliver) -> bool:
        """Queue ``fill``, which writes a payload and the verdict on it, and its way to the host; False if that is full.

        ``fill`` gets uint8 ``[payload_bytes + VERDICT_BYTES]`` on the device and may only queue work there. ``deliver``
        is called on another thread, in order; the payload is its own until nobody holds it any more. Raises
        :class:`ValueError` for a payload longer than a slot, and what ``fill`` raises.
        """
        if payload_bytes > self._slot_bytes:
            raise ValueError(f"{payload_bytes} bytes do not fit a staging slot of {self._slot_bytes}")
        size_bytes = payload_bytes + VERDICT_BYTES
        offset = self._arena.take(size_bytes)
        if offset is None:
            return False
        turn, self._turn = self._turn, (self._turn + 1) % DEVICE_SLOTS
        try:
            if (last := self._copied[turn]) is not None:
                self._streams.hold(last)
            place = self._device[turn, :size_bytes]
            began = self._streams.mark()
            fill(place)
            filled = self._streams.mark()
            copied = self._copied[turn] = self._streams.copy(place, self._host[offset : offset + size_bytes], filled)
        except BaseException:
            self._arena.give_back(offset)
            raise
        self._on_their_way.put(_OnItsWay(offset, payload_bytes, began, filled, copied, deliver))
        return True

    def after(self, action: Callable[[], None]) -> None:
        """Call ``action`` on the other thread, once all that was staged has been delivered."""
        self._on_their_way.put(action)

    def close(self, timeout_s: float = 2.0) -> None:
        """Deliver what is on its way and stop."""
        self._on_their_way.put(None)
        self._thread.join(timeout_s)

    def _hand_over(self) -> None:
        while (item := self._on_their_way.get()) is not None:
            try:
                if isinstance(item, _OnItsWay):
                    item.deliver(self._arrived(item))
                else:
                    item()
            except Exception:  # the thread must outlive any one transfer
                log.exception("staged KV could not be handed over")
            # Its memory must not wait for the next one to come.
            del item

    def _arrived(self, item: _OnItsWay) -> Staged:
        # Not a view of the tensor's array: numpy would share that one's base, and nobody could tell when it is let go.
        size_bytes = item.payload_bytes + VERDICT_BYTES
        lease = (ctypes.c_uint8 * size_bytes).from_address(self._host.data_ptr() + item.offset)
        weakref.finalize(lease, _give_back, self._arena, item.offset, self._host).atexit = False
        whole = np.frombuffer(memoryview(lease), np.uint8)
        item.copied.synchronize()
        return Staged(
            payload=whole[: item.payload_bytes],
            refused=bool(whole[item.payload_bytes :].any()),
            filled_ns=int(item.began.elapsed_time(item.filled) * 1e6),
            copied_ns=int(item.filled.elapsed_time(item.copied) * 1e6),
        )


def _give_back(arena: Arena, offset: int, _memory: Tensor) -> None:
    """Free a piece; until now its lease has kept the memory."""
    arena.give_back(offset)
