"""The worker's half of exporting: carry out a step's plan on the paged caches and hand slabs to the sender.

Layers leave in groups of one frame while later ones are still being computed; what the hooks of single layers did not
export, for instance because a full CUDA graph skipped them, leaves at the end of the step. A failure here fails one
transfer, never the step: vLLM serves the other requests on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import structlog

from gpu_prefill.encode import encode, encodes, payload_bytes, rows_for
from gpu_prefill.extract import Layer, Places, find, gather, gather_into
from gpu_prefill.pages import Packing
from gpu_prefill.schedule import Job, StepPlan
from gpu_prefill.staging import Staged, Staging
from transfer.frames import Element
from transfer.layout import Elements, layers_together
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

    def submit(
        self,
        ticket: str,
        tokens: range,
        first_layer: int,
        elements: Elements,
        element: Element,
        gather_ns: int,
        *,
        d2h_ns: int = 0,
        encoded: bool = False,
    ) -> bool:
        """Queue some layers of a chunk, or their payload; False if the transfer has failed."""

    def finish(self, ticket: str, end_token: int) -> None:
        """Queue END."""

    def abort(self, ticket: str, reason: str) -> None:
        """Drop what is queued and send ABORT."""

    def take_failed(self) -> dict[str, str]:
        """Tickets that failed since the last call, with reasons."""

    def close(self, timeout_s: float = 2.0) -> None:
        """Stop."""


class Exporter:
    """One model's caches and the sender their tokens go to.

    ``layers`` are the caches in layer order. With ``staging``, on the caches' device, codecs that are made there are,
    and nothing waits for it; without, rows are copied to the host at once. Where vLLM's scheduler counts in blocks of
    several kernel blocks, ``kernel_blocks`` is how many. ``interleave_dims`` is the rotary width of K if the model
    keeps it in "half" order, else 0. A group of layers is what fits ``frame_bytes``, less
    towards the last (:func:`~transfer.layout.layers_together`). Steps in which exporting holds the
    forward up for longer than ``budget_ms`` are counted in ``steps_over_budget``.
    """

    def __init__(
        self,
        sender: Sender,
        layers: Sequence[Layer],
        packing: Packing,
        element: Element,
        *,
        kernel_blocks: int,
        interleave_dims: int,
        frame_bytes: int,
        budget_ms: float,
        staging: Staging | None = None,
    ) -> None:
        self._sender = sender
        self._layers = layers
        self._staging = staging
        self._packing = packing
        self._element = element
        self._kernel_blocks = kernel_blocks
        self._interleave_dims = interleave_dims
        self._frame_bytes = frame_bytes
        self._budget_ns = int(budget_ms * 1e6)
        self.steps_over_budget = 0
        self._open: dict[str, Ticket] = {}
        self._places: dict[tuple[str, int], Places] = {}
        self._failed: dict[str, str] = {}
        self._jobs: Sequence[Job] = ()
        self._group_layers = len(layers)
        self._exported_layers = 0
        self._blocked_ns = 0

    def begin(self, plan: StepPlan) -> None:
        """Begin transfers, before the step computes: the handshake with the decode worker overlaps with it."""
        self._jobs = plan.jobs
        self._exported_layers = self._blocked_ns = 0
        if plan.jobs:
            longest = max(min(job.chunk_tokens, job.end - job.start) for job in plan.jobs)
            _, heads, _, width = self._layers[0].cache.shape
            self._group_layers = max(1, self._frame_bytes // (2 * longest * heads * width))
        for ticket in plan.opened:
            self._open[ticket.ticket] = ticket
            try:
                self._sender.open(ticket)
            except Exception as error:  # noqa: BLE001 - whatever it is, only this transfer may fail
                self._fail(ticket.ticket, f"cannot open the transfer: {error}")

    def layer_saved(self, layer: int) -> None:
        """The step's tokens of all layers up to ``layer`` are in the caches, or queued to be: export whole groups."""
        if self._jobs and layer + 1 >= self._exported_layers + self._due_layers:
            self._export_layers(layer + 1)

    def export(self, plan: StepPlan) -> None:
        """Export the rest of the step and end what is complete; called when the step's forward is queued."""
        if self._jobs:
            self._export_layers(len(self._layers))
            self._jobs = ()
            self._places.clear()
        if self._blocked_ns > self._budget_ns:
            self.steps_over_budget += 1
            if self.steps_over_budget.bit_count() == 1:
                log.warning(
                    "exporting held up the forward for longer than its budget",
                    blocked_ms=round(self._blocked_ns / 1e6, 1),
                    budget_ms=self._budget_ns / 1e6,
                    steps_over_budget=self.steps_over_budget,
                )
        for ticket, end_token in plan.ended.items():
            if self._open.pop(ticket, None) is not None:
                self._finish(ticket, end_token)

    def settle(self, plan: StepPlan) -> None:
        """Give up what was aborted; in a step that computes nothing, wait a little."""
        for ticket, reason in plan.aborted.items():
            if self._open.pop(ticket, None) is not None:
                self._sender.abort(ticket, reason)
        if plan.idle:
            time.sleep(_IDLE_STEP_S)

    def report(self) -> tuple[int, dict[str, str]]:
        """Bytes that wait for the wire, and tickets that failed since the last report."""
        failed = self._sender.take_failed() | self._failed
        self._failed = {}
        for ticket in failed:
            self._open.pop(ticket, None)
        staged_bytes = self._staging.used_bytes if self._staging is not None else 0
        return max(self._sender.backlog_bytes, staged_bytes), failed

    def close(self) -> None:
        """Stop the sender."""
        if self._staging is not None:
            self._staging.close()
        self._sender.close()

    def _export_layers(self, end_layer: int) -> None:
        """Export the layers from the first that has not been exported up to ``end_layer``, group by group."""
        began = time.monotonic_ns()
        while self._exported_layers < end_layer:
            layers = range(self._exported_layers, min(self._exported_layers + self._due_layers, end_layer))
            for job in self._jobs:
                self._run_job(job, layers)
            self._exported_layers = layers.stop
        self._blocked_ns += time.monotonic_ns() - began

    @property
    def _due_layers(self) -> int:
        return layers_together(len(self._layers) - self._exported_layers, self._group_layers)

    def _run_job(self, job: Job, layers: range) -> None:
        if job.ticket not in self._open:
            return
        export = self._copy if self._staging is None else self._stage
        try:
            for start in range(job.start, job.end, job.chunk_tokens):
                if not export(job, range(start, min(start + job.chunk_tokens, job.end)), layers):
                    self._open.pop(job.ticket, None)
                    return
        except Exception as error:
            log.exception("export failed", request_id=self._open[job.ticket].request_id)
            self._fail(job.ticket, f"export failed: {error}")

    def _copy(self, job: Job, tokens: range, layers: range) -> bool:
        """Copy a chunk's layers to the host and hand them over; False if the transfer has failed."""
        began = time.monotonic_ns()
        caches = self._layers[layers.start : layers.stop]
        block_ids = _kernel_block_ids(job.block_ids, self._kernel_blocks)
        elements = gather(caches, self._packing, block_ids, tokens.start, tokens.stop, self._interleave_dims_of(job))
        gather_ns = time.monotonic_ns() - began
        return self._sender.submit(job.ticket, tokens, layers.start, elements, self._element, gather_ns)

    def _stage(self, job: Job, tokens: range, layers: range) -> bool:
        """Queue a chunk's layers, encoded if their codec is made on the device; False if the transfer fails."""
        staging = self._staging
        assert staging is not None  # noqa: S101 - `_run_job` chose this way
        caches = self._layers[layers.start : layers.stop]
        _, heads, block_size, width = caches[0].cache.shape
        dim, interleave_dims = width // 2, self._interleave_dims_of(job)
        wanted = self._open[job.ticket].codec
        codec = wanted if encodes(wanted, dim, heads * len(tokens)) else "raw"
        places = self._places.get((job.ticket, tokens.start))
        if places is None:
            block_ids = _kernel_block_ids(job.block_ids, self._kernel_blocks)
            places = self._places[job.ticket, tokens.start] = find(staging.to_device, block_ids, tokens, block_size)

        def fill(out: Tensor) -> None:
            shape = (len(layers), 2, len(tokens), heads, dim)
            rows = rows_for(codec, out, shape, caches[0].row_dtype)
            gather_into(rows, caches, self._packing, places, interleave_dims)
            encode(codec, rows, out)

        def deliver(staged: Staged) -> None:
            if staged.refused:
                self._sender.abort(job.ticket, f"KV holds values that codec {codec} cannot carry")
                return
            elements = staged.payload.view(np.uint16).reshape(len(layers), -1)
            self._sender.submit(
                job.ticket,
                tokens,
                layers.start,
                elements,
                self._element,
                staged.filled_ns,
                d2h_ns=staged.copied_ns,
                encoded=codec == wanted,
            )

        if staging.stage(payload_bytes(codec, len(tokens) * heads * dim, len(layers)), fill, deliver):
            return True
        self._fail(job.ticket, f"staging is full: over {staging.used_bytes} of {staging.host_bytes} bytes wait")
        return False

    def _interleave_dims_of(self, job: Job) -> int:
        return self._interleave_dims if job.interleave else 0

    def _finish(self, ticket: str, end_token: int) -> None:
        if self._staging is None:
            self._sender.finish(ticket, end_token)
        else:
            self._staging.after(lambda: self._sender.finish(ticket, end_token))

    def _fail(self, ticket: str, reason: str) -> None:
        log.warning("transfer failed", request_id=self._open.pop(ticket).request_id, reason=reason)
        self._failed[ticket] = reason
        self._sender.abort(ticket, reason)


def _kernel_block_ids(block_ids: Sequence[int], ratio: int) -> Sequence[int]:
    """The scheduler's block ids as the kernels count them, ``ratio`` to each."""
    if ratio == 1:
        return block_ids
    return [block_id * ratio + i for block_id in block_ids for i in range(ratio)]
