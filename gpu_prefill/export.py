"""The worker's half of exporting: carry out a step's plan on the paged caches and hand chunks to the sender.

A failure here fails one transfer, never the step: vLLM serves the other requests on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import structlog

from gpu_prefill.extract import gather
from gpu_prefill.pages import Packing
from gpu_prefill.schedule import Job, StepPlan
from transfer.frames import Element
from transfer.layout import Elements
from transfer.messages import Ticket

if TYPE_CHECKING:
    from torch import Tensor

log = structlog.get_logger()

# A step that computes nothing would be repeated at once; this is the longest a deferred request overwaits.
_IDLE_STEP_S = 0.002


class Sender(Protocol):
    """What exporting needs of :class:`transfer.sender.KVSender`; tests record instead of sending."""

    @property
    def backlog_bytes(self) -> int:
        """KV bytes that wait for the wire."""

    def open(self, ticket: Ticket) -> None:
        """Begin a transfer."""

    def submit(self, ticket: str, start_token: int, elements: Elements, element: Element, gather_ns: int) -> bool:
        """Queue a chunk; False if the transfer has failed."""

    def finish(self, ticket: str, num_tokens: int) -> None:
        """Queue END."""

    def abort(self, ticket: str, reason: str) -> None:
        """Drop what is queued and send ABORT."""

    def take_failed(self) -> dict[str, str]:
        """Tickets that failed since the last call, with reasons."""

    def close(self, timeout_s: float = 2.0) -> None:
        """Stop."""


class Exporter:
    """One model's caches and the sender their tokens go to.

    ``layers`` are the caches in layer order, each ``[B, H, N, 2 * D]``. Where vLLM's scheduler counts in blocks of
    several kernel blocks, ``kernel_blocks`` is how many. ``interleave_dims`` is the rotary width of K if the model
    keeps it in "half" order, else 0.
    """

    def __init__(
        self,
        sender: Sender,
        layers: Sequence[Tensor],
        packing: Packing,
        element: Element,
        *,
        kernel_blocks: int,
        interleave_dims: int,
    ) -> None:
        self._sender = sender
        self._layers = layers
        self._packing = packing
        self._element = element
        self._kernel_blocks = kernel_blocks
        self._interleave_dims = interleave_dims
        self._request_of: dict[str, str] = {}
        self._failed: dict[str, str] = {}

    def open(self, tickets: Sequence[Ticket]) -> None:
        """Begin transfers, before the step computes: the handshake with the decode worker overlaps with it."""
        for ticket in tickets:
            self._request_of[ticket.ticket] = ticket.request_id
            try:
                self._sender.open(ticket)
            except Exception as error:  # noqa: BLE001 - whatever it is, only this transfer may fail
                self._fail(ticket.ticket, f"cannot open the transfer: {error}")

    def export(self, plan: StepPlan) -> None:
        """Export the step's tokens and end what is complete; called when the step's forward is queued."""
        for job in plan.jobs:
            self._run_job(job)
        for ticket, num_tokens in plan.ended.items():
            if self._request_of.pop(ticket, None) is not None:
                self._sender.finish(ticket, num_tokens)

    def settle(self, plan: StepPlan) -> None:
        """Give up what was aborted; in a step that computes nothing, wait a little."""
        for ticket, reason in plan.aborted.items():
            if self._request_of.pop(ticket, None) is not None:
                self._sender.abort(ticket, reason)
        if plan.idle:
            time.sleep(_IDLE_STEP_S)

    def report(self) -> tuple[int, dict[str, str]]:
        """Bytes that wait for the wire, and tickets that failed since the last report."""
        failed = self._sender.take_failed() | self._failed
        self._failed = {}
        for ticket in failed:
            self._request_of.pop(ticket, None)
        return self._sender.backlog_bytes, failed

    def close(self) -> None:
        """Stop the sender."""
        self._sender.close()

    def _run_job(self, job: Job) -> None:
        if job.ticket not in self._request_of:
            return
        block_ids = _kernel_block_ids(job.block_ids, self._kernel_blocks)
        interleave_dims = self._interleave_dims if job.interleave else 0
        try:
            for start in range(job.start, job.end, job.chunk_tokens):
                began = time.monotonic_ns()
                end = min(start + job.chunk_tokens, job.end)
                elements = gather(self._layers, self._packing, block_ids, start, end, interleave_dims)
                gather_ns = time.monotonic_ns() - began
                if not self._sender.submit(job.ticket, start, elements, self._element, gather_ns):
                    self._request_of.pop(job.ticket)
                    return
        except Exception as error:
            log.exception("export failed", request_id=self._request_of[job.ticket])
            self._fail(job.ticket, f"export failed: {error}")

    def _fail(self, ticket: str, reason: str) -> None:
        log.warning("transfer failed", request_id=self._request_of.pop(ticket), reason=reason)
        self._failed[ticket] = reason
        self._sender.abort(ticket, reason)


def _kernel_block_ids(block_ids: Sequence[int], ratio: int) -> Sequence[int]:
    """The scheduler's block ids as the kernels count them, ``ratio`` to each."""
    if ratio == 1:
        return block_ids
    return [block_id * ratio + i for block_id in block_ids for i in range(ratio)]
