"""From paged caches through the staging and the real sender to a receiver, with little memory and a bad link."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gpu_prefill.export import Exporter  # noqa: E402
from gpu_prefill.extract import Layer  # noqa: E402
from gpu_prefill.schedule import Job, StepPlan  # noqa: E402
from gpu_prefill.staging import Staging  # noqa: E402
from gpu_prefill.streams import HostStreams  # noqa: E402
from tests.transfer.kv_plane import CHUNK_TOKENS, FRAME_BYTES, GEOMETRY, Worker, make_ticket  # noqa: E402
from transfer.frames import Element  # noqa: E402
from transfer.sender import KVSender  # noqa: E402

BLOCKS, BLOCK_TOKENS = 16, 16
TOKENS = 15 * BLOCK_TOKENS + 3
STEP_TOKENS = 3 * CHUNK_TOKENS


@pytest.mark.parametrize(("codec", "error"), [("raw", 0.0), ("q8", 0.01)])
def test_a_prompt_lands_and_all_staging_memory_comes_back(codec: str, error: float) -> None:
    worker = Worker()
    sender = KVSender(GEOMETRY, max_backlog_bytes=1 << 20, frame_bytes=FRAME_BYTES)
    # Memory for two steps: what was sent must be let go while the prompt is still coming.
    step_bytes = 2 * STEP_TOKENS * GEOMETRY.elements_per_token
    staging = Staging(HostStreams(), torch.device("cpu"), slot_bytes=FRAME_BYTES, host_bytes=2 * step_bytes)
    shape = (GEOMETRY.num_layers, BLOCKS, GEOMETRY.num_kv_heads, BLOCK_TOKENS, 2 * GEOMETRY.head_dim_k)
    caches = torch.randn(shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    exporter = Exporter(
        sender,
        [Layer(cache) for cache in caches],
        "strided",
        Element.BF16,
        kernel_blocks=1,
        interleave_dims=0,
        frame_bytes=FRAME_BYTES,
        budget_ms=1000.0,
        staging=staging,
    )
    try:
        ticket = make_ticket(worker.endpoint, codec=codec, deadline_ms=60_000)
        landed = worker.expect(ticket)
        blocks = tuple(int(each) for each in np.random.default_rng(5).permutation(BLOCKS))
        for start in range(0, TOKENS, STEP_TOKENS):
            end = min(start + STEP_TOKENS, TOKENS)
            plan = StepPlan(jobs=[Job(ticket.ticket, start, end, blocks, CHUNK_TOKENS, interleave=False)])
            plan.opened, plan.ended = ([ticket] if start == 0 else []), ({ticket.ticket: end} if end == TOKENS else {})
            exporter.begin(plan)
            exporter.export(plan)
            # As deferred requests would wait.
            assert worker.run_until(lambda: _backlog(exporter) <= step_bytes)
        assert worker.run_until(lambda: landed.over)
        assert landed.error is None
        # K rows, then V rows: [layers, K or V, tokens, elements of a row].
        halves = caches[:, list(blocks)].transpose(2, 3).flatten(1, 2)[:, :TOKENS].float().chunk(2, dim=-1)
        rows = np.stack([half.flatten(2).numpy() for half in halves], axis=1)
        for start in range(0, TOKENS, CHUNK_TOKENS):
            wanted = rows[:, :, start : min(start + CHUNK_TOKENS, TOKENS)].reshape(GEOMETRY.num_layers, -1)
            found = (landed.chunk(start).astype(np.uint32) << 16).view(np.float32)
            assert np.abs(found - wanted).max() <= error * np.abs(wanted).max()
        assert worker.run_until(lambda: _backlog(exporter) == 0)
    finally:
        exporter.close()
        worker.close()


def _backlog(exporter: Any) -> int:
    backlog_bytes: int = exporter.report()[0]
    return backlog_bytes
