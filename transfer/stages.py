"""Names of a request's stages, and the meter that times them.

Every duration is measured on one host's monotonic clock; hosts exchange durations, never timestamps.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec


class SenderReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the prefill node spent on one transfer; travels in the END frame.

    ``num_tokens`` is the position after the last token that was sent.
    """

    num_tokens: int
    num_frames: int
    kv_raw_bytes: int
    kv_wire_bytes: int
    gather_ns: int
    encode_ns: int
    d2h_ns: int = 0
    resent_frames: int = 0


def joined(reports: Sequence[SenderReport]) -> SenderReport:
    """One report of all shares of a transfer: bytes and frames add up; times, side by side, are the longest."""
    return SenderReport(
        num_tokens=min(each.num_tokens for each in reports),
        num_frames=sum(each.num_frames for each in reports),
        kv_raw_bytes=sum(each.kv_raw_bytes for each in reports),
        kv_wire_bytes=sum(each.kv_wire_bytes for each in reports),
        gather_ns=max(each.gather_ns for each in reports),
        encode_ns=max(each.encode_ns for each in reports),
        d2h_ns=max(each.d2h_ns for each in reports),
        resent_frames=sum(each.resent_frames for each in reports),
    )


class DecodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the decode worker knows about one finished request; travels with its last tokens.

    ``wire_ns`` spans the first frame to the END frame as they arrived; where prefill runs in several steps it contains
    the computing between them. ``transfer_exposed_ns`` is how long the sequence stood still for KV after Start, of
    which ``landing_tail_ns`` came after the last frame with data. Of the reused tokens, ``restored_tokens`` came from a
    tier below the cells in ``restore_ns``. ``worker_queue_ns`` was the wait for cells. Speculation drafted and accepted
    so many tokens.
    """

    prompt_tokens: int
    completion_tokens: int
    kv_reused_tokens: int = 0
    kv_raw_bytes: int = 0
    kv_wire_bytes: int = 0
    kv_resent_frames: int = 0
    gather_ns: int = 0
    encode_ns: int = 0
    d2h_ns: int = 0
    wire_ns: int = 0
    decode_frame_ns: int = 0
    inject_ns: int = 0
    transfer_exposed_ns: int = 0
    landing_tail_ns: int = 0
    local_prefill_ns: int = 0
    first_decode_ns: int = 0
    decode_ns: int = 0
    restored_tokens: int = 0
    restore_ns: int = 0
    worker_queue_ns: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Meter:
    """Adds up nanoseconds by stage name."""

    def __init__(self) -> None:
        self.ns: defaultdict[str, int] = defaultdict(int)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body and add it to ``name``."""
        began = time.monotonic_ns()
        try:
            yield
        finally:
            self.ns[name] += time.monotonic_ns() - began
