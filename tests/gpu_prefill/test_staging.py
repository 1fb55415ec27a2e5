from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gpu_prefill.staging import DEVICE_SLOTS, Staged, Staging  # noqa: E402
from gpu_prefill.streams import HostMark, HostStreams  # noqa: E402

SLOT_BYTES = 1000
PATIENCE_S = 20.0


class SlowStreams(HostStreams):
    """Copies that are not over before ``released`` is set; notes what had to wait for what."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.held: list[Any] = []
        self.copies: list[Any] = []

    def hold(self, until: Any) -> None:
        self.held.append(until)

    def copy(self, source: Any, out: Any, after: Any) -> Any:  # noqa: ARG002 - computed at once
        streams = self

        class Mark(HostMark):
            def synchronize(self) -> None:
                assert streams.released.wait(PATIENCE_S)
                out.copy_(kept)

        kept = source.clone()
        self.copies.append(Mark())
        return self.copies[-1]


@pytest.fixture
def slow() -> SlowStreams:
    return SlowStreams()


@pytest.fixture
def staging(slow: SlowStreams) -> Iterator[Staging]:
    staging = Staging(slow, torch.device("cpu"), slot_bytes=SLOT_BYTES, host_bytes=64 << 10)
    yield staging
    slow.released.set()
    staging.close()


def writes(value: int, *, refused: bool = False) -> Any:
    def fill(out: torch.Tensor) -> None:
        out[:-2] = value
        out[-2:] = int(refused)

    return fill


def test_what_is_staged_comes_in_order_and_its_end_after_it(slow: SlowStreams, staging: Staging) -> None:
    came: list[Any] = []
    for number in range(40):
        assert staging.stage(100 + number, writes(number, refused=number == 7), came.append)
    staging.after(lambda: came.append("end"))
    assert came == []
    slow.released.set()
    staging.close()
    assert came[-1] == "end"
    assert [(len(each.payload), int(each.payload[0]), each.refused) for each in came[:-1]] == [
        (100 + number, number, number == 7) for number in range(40)
    ]
    assert all((each.payload == each.payload[0]).all() and each.copied_ns >= 0 for each in came[:-1])


def test_a_slot_of_the_device_is_used_again_only_after_its_last_copy(slow: SlowStreams, staging: Staging) -> None:
    for _ in range(DEVICE_SLOTS + 3):
        assert staging.stage(10, writes(1), lambda _: None)
    assert slow.held == slow.copies[:3]


def test_memory_is_free_when_the_last_that_holds_it_lets_go(slow: SlowStreams, staging: Staging) -> None:
    came: list[Staged] = []
    for _ in range(3):
        assert staging.stage(200, writes(1), came.append)
    used_bytes = staging.used_bytes
    assert used_bytes == 3 * 256
    slow.released.set()
    staging.close()
    # As the sender and ZeroMQ hold it: a memoryview of a view of a part.
    kept = memoryview(came[1].payload.view(np.uint16).reshape(2, -1)[1:].reshape(-1))
    came.clear()
    gc.collect()
    assert staging.used_bytes == 256
    del kept
    gc.collect()
    assert staging.used_bytes == 0


def test_a_host_that_is_full_takes_no_more_until_something_leaves(slow: SlowStreams, staging: Staging) -> None:
    count = 0
    while staging.stage(SLOT_BYTES, writes(1), lambda _: None):
        count += 1
    assert count == 64
    slow.released.set()
    staging.close()
    gc.collect()
    assert staging.stage(SLOT_BYTES, writes(1), lambda _: None)


def test_what_cannot_be_filled_leaves_nothing_behind(staging: Staging) -> None:
    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        staging.stage(10, fail, lambda _: None)
    with pytest.raises(ValueError, match="do not fit a staging slot of 1000"):
        staging.stage(SLOT_BYTES + 1, writes(1), lambda _: None)
    assert staging.used_bytes == 0


def test_a_delivery_that_fails_does_not_stop_the_next(slow: SlowStreams, staging: Staging) -> None:
    came: list[Staged] = []

    def fail(_: Staged) -> None:
        raise RuntimeError("gone")

    slow.released.set()
    staging.stage(10, writes(1), fail)
    staging.stage(10, writes(2), came.append)
    staging.close()
    assert [int(each.payload[0]) for each in came] == [2]
