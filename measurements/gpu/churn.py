"""The exporter under a scheduler that has too few blocks: whatever is evicted, preempted or aborted, no token is wrong.

Blocks are overwritten as soon as a step has freed them, on the stream that computes: only stream order protects what
the exporter copies, as in vLLM.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import numpy as np

from gpu_prefill.export import Exporter
from gpu_prefill.schedule import PARAMS_KEY, ExportSchedule
from gpu_prefill.staging import Staging
from gpu_prefill.streams import streams_of
from measurements.gpu.paged import GEOMETRY, LAYOUTS, Bits, caches_of
from transfer import layout as kv_layout
from transfer.codecs import by_name
from transfer.frames import Element
from transfer.layout import Elements, interleaved_index
from transfer.messages import Landing, Ticket

LAYERS, HEADS, DIM, BLOCK_TOKENS = 4, 2, 64, 16
NUM_BLOCKS = 24
# A step serves several requests, and they want more blocks than there are.
STEP_TOKENS, REQUEST_STEP_TOKENS = 96, 20
CHUNK_TOKENS = 40
MAX_BACKLOG_BYTES = 1000
FRAME_BYTES = 2 * 2 * CHUNK_TOKENS * HEADS * DIM
# `zstd` is not made on a device: its elements come as they are.
CODECS = ("raw", "q8", "k8v4", "rows_q8_0", "zstd")
MAX_STEPS = 10_000


@dataclass
class Request:
    """A prompt and its KV, ``[layers, 2, tokens, H, D]``; ``computed`` tokens of it are in ``blocks``."""

    ticket: Ticket
    kv: Bits
    blocks: list[int] = field(default_factory=list)
    computed: int = 0

    @property
    def tokens(self) -> int:
        """Length of the prompt."""
        return int(self.kv.shape[2])


class Slab(NamedTuple):
    """What the sender was given: some layers of a chunk, or their payload."""

    tokens: range
    first_layer: int
    elements: Elements
    encoded: bool


class Recorder:
    """Keeps what it is given in place of :class:`transfer.sender.KVSender`."""

    def __init__(self) -> None:
        self.backlog_bytes = 0
        self.slabs: dict[str, list[Slab]] = {}
        self.ended: dict[str, int] = {}

    def open(self, ticket: Ticket) -> None:
        """Begin a transfer."""
        self.slabs[ticket.ticket] = []

    def submit(
        self,
        ticket: str,
        tokens: range,
        first_layer: int,
        elements: Elements,
        element: Element,  # noqa: ARG002 - KVSender's signature
        gather_ns: int,  # noqa: ARG002
        *,
        d2h_ns: int = 0,  # noqa: ARG002
        encoded: bool = False,
    ) -> bool:
        """Keep some layers of a chunk; the memory of what was staged is wanted back."""
        if ticket in self.slabs:
            self.slabs[ticket].append(Slab(tokens, first_layer, elements.copy(), encoded))
        return ticket in self.slabs

    def finish(self, ticket: str, end_token: int) -> None:
        """Keep where the prompt ends."""
        self.ended[ticket] = end_token

    def abort(self, ticket: str, reason: str) -> None:  # noqa: ARG002
        """Forget a transfer."""
        self.slabs.pop(ticket, None)

    def take_failed(self) -> dict[str, str]:
        """Nothing fails here."""
        return {}

    def close(self, timeout_s: float = 2.0) -> None:
        """Nothing to stop."""


class FakeEngine:
    """A scheduler and a model that computes by copying: requests run until their prompts are in the caches."""

    def __init__(self, device: str, layout: Any, seed: int, *, staged: bool) -> None:
        import torch

        self._torch, self._device, self._random = torch, device, random.Random(seed)  # noqa: S311 - no secrets
        empty = np.zeros((LAYERS, 2, NUM_BLOCKS, BLOCK_TOKENS, HEADS, DIM), np.uint16)
        self._caches = caches_of(empty, layout, torch.bfloat16, device)
        self.sender = Recorder()
        self._exporter = Exporter(
            self.sender,
            self._caches,
            "strided",
            Element.BF16,
            kernel_blocks=1,
            interleave_dims=DIM,
            frame_bytes=FRAME_BYTES,
            budget_ms=1e9,
            staging=_staging(torch.device(device)) if staged else None,
        )
        self._schedule = ExportSchedule(MAX_BACKLOG_BYTES)
        self._free = list(range(NUM_BLOCKS))
        self.waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self.counts = {"steps": 0, "preempted": 0, "aborted": 0, "deferred": 0, "steps_without_hooks": 0}
        self.finished: list[Request] = []

    def add(self, request: Request) -> None:
        """A request comes in."""
        params = {PARAMS_KEY: msgspec.to_builtins(request.ticket)}
        self._schedule.admit(request.ticket.ticket, params, request.tokens)
        self.waiting.append(request)

    def run(self) -> None:
        """Step until nothing waits or runs; raises :class:`RuntimeError` if that never comes."""
        while self.waiting or self._running:
            if self.counts["steps"] == MAX_STEPS:
                raise RuntimeError(f"{len(self.waiting) + len(self._running)} requests never finished")
            self._step()
        # Aborts leave with the next plan.
        self._settle({}, {})
        self._exporter.close()

    def _step(self) -> None:
        self.counts["steps"] += 1
        self.sender.backlog_bytes = self._random.choice((0, 0, MAX_BACKLOG_BYTES))
        scheduled: dict[str, int] = {}
        left = STEP_TOKENS
        for request in list(self._running):
            if request in self._running and left:
                left -= self._give(request, left, scheduled)
        while left and self.waiting and self._free:
            request = self.waiting[0]
            if self._schedule.must_wait(request.ticket.ticket):
                self.counts["deferred"] += 1
                break
            self._running.append(self.waiting.popleft())
            if not (given := self._give(request, left, scheduled)):
                break
            left -= given
        running = {request.ticket.ticket: request for request in self._running}
        computed_after = {name: running[name].computed + count for name, count in scheduled.items() if name in running}
        self._settle(computed_after, running)
        for request in list(self._running):
            gone = self._random.random() < 0.02
            if gone or request.computed == request.tokens:
                self._schedule.finish(request.ticket.ticket, prefilled=request.computed == request.tokens)
                self.counts["aborted"] += request.computed < request.tokens
                if request.computed == request.tokens:
                    self.finished.append(request)
                self._running.remove(request)
                self._release(request)

    def _give(self, request: Request, left: int, scheduled: dict[str, int]) -> int:
        """Find blocks for a step's tokens of ``request``, if need be the newest request's; returns how many tokens."""
        count = min(left, REQUEST_STEP_TOKENS, request.tokens - request.computed)
        wanted = -(-(request.computed + count) // BLOCK_TOKENS) - len(request.blocks)
        while wanted > len(self._free):
            victim = self._running[-1]
            if victim is request:
                self._preempt(request, scheduled)
                return 0
            self._preempt(victim, scheduled)
        added = [self._free.pop(self._random.randrange(len(self._free))) for _ in range(wanted)]
        fresh = not request.blocks
        request.blocks += added
        name = request.ticket.ticket
        if fresh:
            self._schedule.place(name, request.blocks)
        else:
            self._schedule.extend(name, added)
        scheduled[name] = count
        return count

    def _preempt(self, request: Request, scheduled: dict[str, int]) -> None:
        self.counts["preempted"] += request.computed > 0
        scheduled.pop(request.ticket.ticket, None)
        self._running.remove(request)
        self._release(request)
        request.computed = 0
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        if request.blocks:
            blocks = self._torch.tensor(request.blocks, device=self._device)
            for layer in self._caches:
                layer.cache[blocks] = -1.0
        self._free += request.blocks
        request.blocks = []

    def _settle(self, computed_after: dict[str, int], running: dict[str, Request]) -> None:
        """One step from plan to report, as ``connector.py`` orders it."""
        plan = self._schedule.plan(computed_after, computes=bool(computed_after))
        self._exporter.begin(plan)
        hooks = self._random.random() < 0.8
        self.counts["steps_without_hooks"] += not hooks
        for layer, (cache, *_) in enumerate(self._caches):
            for name, after in computed_after.items():
                self._compute(cache, running[name], layer, after)
            if hooks:
                self._exporter.layer_saved(layer)
        self._exporter.export(plan)
        for name, after in computed_after.items():
            running[name].computed = after
        self._exporter.settle(plan)
        self._schedule.report(*self._exporter.report())

    def _compute(self, cache: Any, request: Request, layer: int, after: int) -> None:
        torch = self._torch
        positions = np.arange(request.computed, after)
        blocks = torch.tensor([request.blocks[at // BLOCK_TOKENS] for at in positions], device=self._device)
        slots = torch.tensor(positions % BLOCK_TOKENS, device=self._device)
        k, v = (
            torch.from_numpy(np.ascontiguousarray(request.kv[layer, plane, positions]).view(np.int16))
            .to(self._device)
            .view(torch.bfloat16)
            for plane in range(2)
        )
        cache.transpose(1, 2)[blocks, slots] = torch.cat([k, v], dim=-1)


def run(device: str, requests: int, seed: int = 0) -> list[dict[str, Any]]:
    """Drive it with random prompts in each layout, each way off the device, codecs in turn.

    A sample says what happened and how many elements, or bytes of payloads, were wrong.
    """
    samples = []
    for layout, staged in itertools.product(LAYOUTS, (False, True)):
        engine = FakeEngine(device, layout, seed, staged=staged)
        rng = np.random.default_rng(seed)
        for number in range(requests):
            tokens = int(rng.integers(1, NUM_BLOCKS * BLOCK_TOKENS // 2))
            # Positive and finite, and not too large for any scale.
            kv = rng.integers(0, 0x4600, (LAYERS, 2, tokens, HEADS, DIM), dtype=np.uint16)
            engine.add(Request(_ticket(number, CODECS[number % len(CODECS)], interleaved=bool(number % 2)), kv))
        engine.run()
        ended = engine.sender.ended
        whole = [each for each in engine.finished if ended.get(each.ticket.ticket) == each.tokens]
        samples.append(
            {"part": "churn", "layout": layout, "staged": staged, "requests": requests}
            | engine.counts
            | {"exported": len(whole), "exported_tokens": sum(request.tokens for request in whole)}
            | {"unfinished": len(engine.finished) - len(whole)}
            | {"encoded": sum(slab.encoded for each in whole for slab in engine.sender.slabs[each.ticket.ticket])}
            | {"wrong_elements": sum(_wrong(engine.sender.slabs[each.ticket.ticket], each) for each in whole)}
        )
    return samples


def _wrong(slabs: Sequence[Slab], request: Request) -> int:
    """What differs from the prompt's KV, what never came or came twice included."""
    kv = request.kv.copy()
    if request.ticket.landing.rope_order == "interleaved":
        kv[:, 0] = kv[:, 0][..., interleaved_index(DIM, DIM)]
    times = np.zeros((LAYERS, request.tokens), np.int64)
    wrong = 0
    for tokens, first, elements, encoded in slabs:
        layers = slice(first, first + len(elements))
        wanted = kv[layers, :, tokens.start : tokens.stop].reshape(-1)
        if encoded:
            geometry = msgspec.structs.replace(
                GEOMETRY, num_layers=LAYERS, num_kv_heads=HEADS, head_dim_k=DIM, head_dim_v=DIM
            )
            codec, slab = by_name(request.ticket.codec), kv_layout.Slab(geometry, len(elements), tokens)
            wanted = np.frombuffer(codec.encode(wanted, Element.BF16, slab), np.uint16)
        wrong += int((elements.reshape(-1) != wanted).sum())
        times[layers, tokens.start : tokens.stop] += 1
    return wrong + int((times != 1).sum())


def _staging(device: Any) -> Staging:
    return Staging(streams_of(device), device, slot_bytes=FRAME_BYTES, host_bytes=16 << 20)


def _ticket(number: int, codec: str, *, interleaved: bool) -> Ticket:
    return Ticket(
        request_id=f"churn-{number}",
        ticket=f"{number:032x}",
        kv_endpoint="tcp://127.0.0.1:1",
        codec=codec,
        landing=Landing(cell_type="f16", rope_order="interleaved" if interleaved else "half"),
        chunk_tokens=CHUNK_TOKENS,
        credit_chunks=4,
        deadline_ms=60_000,
    )
