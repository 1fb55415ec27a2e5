"""Ledger entries by the hundred, made from one real one."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec

from proxy.ledger import Entry
from tests.proxy.conftest import Stack


def varied(one: Entry, count: int) -> Iterator[Entry]:
    """``count`` entries like ``one``, of all routes and of any length, some of which lost by splitting."""
    dice = random.Random(0)
    for number in range(count):
        route = dice.choice(("split", "split", "gpu", "cpu"))
        split = route == "split"
        prefill_ns, decode_ns = dice.randrange(10**8, 2 * 10**9), dice.randrange(10**8, 2 * 10**9)
        exposed_ns = dice.randrange(10**6, 10**8) if split else 0
        wire_ns = dice.randrange(10**6, prefill_ns) if split else 0
        gain_ns = dice.randrange(-prefill_ns, 3 * 10**9) if split else None
        yield msgspec.structs.replace(
            one,
            request_id=f"varied-{number}",
            route=route,
            codec=dice.choice(("raw", "q8", "kvz1")) if split else None,
            prompt_tokens=dice.randrange(10, 4000),
            completion_tokens=dice.randrange(1, 200),
            queue_ns=dice.randrange(0, 10**7),
            tokenize_ns=3 * 10**6,
            route_ns=10**5,
            reserve_ns=2 * 10**6 if route != "gpu" else 0,
            prefill_ns=prefill_ns,
            transfer_exposed_ns=exposed_ns,
            decode_ns=decode_ns,
            first_decode_ns=decode_ns // 20 if route != "gpu" else 0,
            wire_ns=wire_ns,
            gather_ns=wire_ns // 10,
            encode_ns=wire_ns // 5,
            decode_frame_ns=wire_ns // 8,
            inject_ns=wire_ns // 12,
            kv_raw_bytes=22 * 10**6 if split else 0,
            kv_wire_bytes=dice.randrange(6, 22) * 10**6 if split else 0,
            ttft_ns=prefill_ns + 10**7,
            total_ns=prefill_ns + exposed_ns + decode_ns + 2 * 10**7,
            specialization_gain_ns=gain_ns,
            prefill_alternative_ns=gain_ns + prefill_ns + exposed_ns if gain_ns is not None else None,
            prefill_alternative_basis="made up" if split else None,
            status="ok",
            failed_over=None,
        )


def add(stack: Stack, entries: Iterator[Entry]) -> None:
    """Into the ledger of the proxy under test."""
    for entry in entries:
        stack.gateway.ledger.add(entry)
