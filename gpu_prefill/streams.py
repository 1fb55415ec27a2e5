"""Where exporting meets the device: its stream of computing, a stream of copies beside it, and points in both.

The same code runs on a CPU, where every operation is over when it returns. What is here for CUDA has not run on it yet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Mark(Protocol):
    """A point in a stream: everything queued before it is done when it is reached."""

    def synchronize(self) -> None:
        """Wait until it is reached. Only threads that the engine does not wait for may call this."""

    def elapsed_time(self, later: Any, /) -> float:
        """Milliseconds from here to a later mark, both reached."""


class Streams(Protocol):
    """What :class:`~gpu_prefill.staging.Staging` needs of a device. No method but ``host_memory`` waits for it."""

    def host_memory(self, num_bytes: int) -> Tensor:
        """uint8 on the host that the device copies into without detours."""

    def to_device(self, numbers: Sequence[int]) -> Tensor:
        """int64 on the device, ordered before what computing is queued next."""

    def mark(self) -> Mark:
        """The end of what is queued for computing."""

    def hold(self, until: Mark) -> None:
        """Let what is queued for computing from here on start only after ``until``."""

    def copy(self, source: Tensor, out: Tensor, after: Mark) -> Mark:
        """Copy to the host beside the computing, once ``after`` is reached; the mark is the copy's end."""


class CudaStreams:
    """One GPU. Its copies get a stream of the lowest priority; computing is the calling thread's current stream."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._torch, self._device = torch, device
        self._copies = torch.cuda.Stream(device, priority=0)

    def host_memory(self, num_bytes: int) -> Tensor:
        """Pinned."""
        return self._torch.empty(num_bytes, dtype=self._torch.uint8, pin_memory=True)

    def to_device(self, numbers: Sequence[int]) -> Tensor:
        """From pinned memory: CUDA would wait for everything queued if it were pageable."""
        pinned = self._torch.tensor(numbers, dtype=self._torch.int64, pin_memory=True)
        return pinned.to(self._device, non_blocking=True)

    def mark(self) -> Mark:
        """An event."""
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        mark: Mark = event
        return mark

    def hold(self, until: Mark) -> None:
        """Make the current stream wait."""
        self._torch.cuda.current_stream(self._device).wait_event(until)

    def copy(self, source: Tensor, out: Tensor, after: Mark) -> Mark:
        """Queue the copy on the stream for copies."""
        with self._torch.cuda.stream(self._copies):
            self._copies.wait_event(after)
            out.copy_(source, non_blocking=True)
            return self.mark()


class HostMark:
    """A point in time."""

    def __init__(self) -> None:
        self._reached_ns = time.monotonic_ns()

    def synchronize(self) -> None:
        """It is reached."""

    def elapsed_time(self, later: HostMark, /) -> float:
        """Milliseconds on the clock."""
        return (later._reached_ns - self._reached_ns) / 1e6


class HostStreams:
    """No device: everything is done when it is asked for."""

    def host_memory(self, num_bytes: int) -> Tensor:
        """Plain memory."""
        import torch

        return torch.empty(num_bytes, dtype=torch.uint8)

    def to_device(self, numbers: Sequence[int]) -> Tensor:
        """A plain tensor."""
        import torch

        return torch.tensor(numbers, dtype=torch.int64)

    def mark(self) -> Mark:
        """Now."""
        return HostMark()

    def hold(self, until: Mark) -> None:
        """It is reached."""

    def copy(self, source: Tensor, out: Tensor, after: Mark) -> Mark:  # noqa: ARG002 - it is reached
        """Copy now."""
        out.copy_(source)
        return HostMark()


def streams_of(device: torch.device) -> Streams:
    """The streams of the caches' device."""
    return HostStreams() if device.type == "cpu" else CudaStreams(device)
