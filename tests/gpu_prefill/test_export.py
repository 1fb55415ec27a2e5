from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gpu_prefill.export import Exporter  # noqa: E402
from gpu_prefill.extract import gather  # noqa: E402
from gpu_prefill.schedule import Job, StepPlan  # noqa: E402
from tests.gpu_prefill.recorder import RecordingSender, make_ticket  # noqa: E402
from transfer.frames import Element  # noqa: E402
from transfer.geometry import KVGeometry  # noqa: E402

GEOMETRY = KVGeometry(
    model_fingerprint="0" * 16,
    num_layers=2,
    num_kv_heads=2,
    head_dim_k=16,
    head_dim_v=16,
    rope_dims=16,
    rope_theta=1e4,
    rope_scaling="none",
    sliding_window=0,
    vocab_size=10,
)
ONE, TWO = make_ticket(1), make_ticket(2)


@pytest.fixture
def layers() -> list[Any]:
    return list(torch.randn((2, 8, 2, 16, 32), generator=torch.Generator().manual_seed(1)).bfloat16())


@pytest.fixture
def sender() -> RecordingSender:
    return RecordingSender(GEOMETRY, max_backlog_bytes=0, frame_bytes=0)


def exporter_of(sender: RecordingSender, layers: list[Any], kernel_blocks: int = 1) -> Exporter:
    return Exporter(sender, layers, "strided", Element.BF16, kernel_blocks=kernel_blocks, interleave_dims=16)


def job(ticket: str, start: int, end: int, block_ids: tuple[int, ...], chunk_tokens: int = 100) -> Job:
    return Job(ticket, start, end, block_ids, chunk_tokens, interleave=False)


def test_chunks_are_no_longer_than_the_ticket_allows_and_end_follows_the_last(
    sender: RecordingSender, layers: list[Any]
) -> None:
    exporter = exporter_of(sender, layers)
    exporter.open([ONE])
    exporter.export(StepPlan(jobs=[job(ONE.ticket, 5, 60, (3, 1, 4, 2), 20)], ended={ONE.ticket: 55}))

    assert [start for start, _ in sender.chunks[ONE.ticket]] == [5, 25, 45]
    whole = gather(layers, "strided", [3, 1, 4, 2], 5, 60)
    sent = np.concatenate([chunk.reshape(2, 2, -1) for _, chunk in sender.chunks[ONE.ticket]], axis=2)
    assert np.array_equal(sent.reshape(2, -1), whole)
    assert sender.finished == {ONE.ticket: 55}


def test_blocks_of_several_kernel_blocks_are_taken_apart(sender: RecordingSender, layers: list[Any]) -> None:
    exporter = exporter_of(sender, layers, kernel_blocks=2)
    exporter.open([ONE])
    exporter.export(StepPlan(jobs=[job(ONE.ticket, 0, 60, (3, 1))]))
    ((_, chunk),) = sender.chunks[ONE.ticket]
    assert np.array_equal(chunk, gather(layers, "strided", [6, 7, 2, 3], 0, 60))


def test_a_failure_stays_with_its_transfer_and_is_reported_once(sender: RecordingSender, layers: list[Any]) -> None:
    exporter = exporter_of(sender, layers)
    exporter.open([ONE, TWO])
    exporter.export(
        StepPlan(
            jobs=[job(ONE.ticket, 0, 60, (3,)), job(TWO.ticket, 0, 10, (2,))], ended={ONE.ticket: 60, TWO.ticket: 10}
        )
    )
    assert "export failed" in sender.aborted[ONE.ticket]
    assert sender.finished == {TWO.ticket: 10}
    assert list(exporter.report()[1]) == [ONE.ticket]
    assert exporter.report() == (0, {})


def test_a_refused_chunk_ends_the_transfer_here(sender: RecordingSender, layers: list[Any]) -> None:
    exporter = exporter_of(sender, layers)
    exporter.open([ONE])
    sender.refuse = True
    exporter.export(StepPlan(jobs=[job(ONE.ticket, 0, 60, (3, 1, 4, 2), 20)], ended={ONE.ticket: 60}))
    assert not sender.finished
    assert exporter.report()[1] == {ONE.ticket: "link is down"}


def test_a_transfer_that_cannot_be_opened_fails_alone(sender: RecordingSender, layers: list[Any]) -> None:
    exporter = exporter_of(sender, layers)
    exporter.open([ONE])
    exporter.open([ONE, TWO])
    assert list(exporter.report()[1]) == [ONE.ticket]
    exporter.export(StepPlan(ended={TWO.ticket: 0}))
    assert sender.finished == {TWO.ticket: 0}


def test_an_abort_is_passed_on_once(sender: RecordingSender, layers: list[Any]) -> None:
    exporter = exporter_of(sender, layers)
    exporter.open([ONE])
    exporter.settle(StepPlan(aborted={ONE.ticket: "gone", TWO.ticket: "never opened"}))
    assert sender.aborted == {ONE.ticket: "gone"}
    exporter.close()
    assert sender.closed
