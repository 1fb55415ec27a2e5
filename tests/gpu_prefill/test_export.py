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
    return RecordingSender(GEOMETRY)


def exporter_of(
    sender: RecordingSender, layers: list[Any], kernel_blocks: int = 1, frame_bytes: int = 1 << 20
) -> Exporter:
    return Exporter(
        sender,
        layers,
        "strided",
        Element.BF16,
        kernel_blocks=kernel_blocks,
        interleave_dims=16,
        frame_bytes=frame_bytes,
        budget_ms=1000.0,
    )


def run(exporter: Exporter, plan: StepPlan, hooks: int = 0) -> None:
    """One step of which the hooks of the first layers come."""
    exporter.begin(plan)
    for layer in range(hooks):
        exporter.layer_saved(layer)
    exporter.export(plan)


def job(ticket: str, start: int, end: int, block_ids: tuple[int, ...], chunk_tokens: int = 100) -> Job:
    return Job(ticket, start, end, block_ids, chunk_tokens, interleave=False)


def test_chunks_are_no_longer_than_the_ticket_allows_and_end_follows_the_last(
    sender: RecordingSender, layers: list[Any]
) -> None:
    exporter = exporter_of(sender, layers)
    run(exporter, StepPlan(opened=[ONE], jobs=[job(ONE.ticket, 5, 60, (3, 1, 4, 2), 20)], ended={ONE.ticket: 55}))

    assert [start for start, _ in sender.chunks[ONE.ticket]] == [5, 25, 45]
    whole = gather(layers, "strided", [3, 1, 4, 2], 5, 60)
    sent = np.concatenate([chunk.reshape(2, 2, -1) for _, chunk in sender.chunks[ONE.ticket]], axis=2)
    assert np.array_equal(sent.reshape(2, -1), whole)
    assert sender.finished == {ONE.ticket: 55}


@pytest.mark.parametrize("hooks", [0, 1, 2])
@pytest.mark.parametrize("frame_bytes", [1, 1 << 20])
def test_layers_leave_once_whether_or_not_their_hooks_come(
    sender: RecordingSender, layers: list[Any], hooks: int, frame_bytes: int
) -> None:
    exporter = exporter_of(sender, layers, frame_bytes=frame_bytes)
    jobs = [job(ONE.ticket, 0, 60, (3, 1, 4, 2), 20), job(TWO.ticket, 7, 16, (5,))]
    run(exporter, StepPlan(opened=[ONE, TWO], jobs=jobs, ended={ONE.ticket: 60, TWO.ticket: 16}), hooks)
    assert sender.tokens(ONE.ticket) == list(range(60))
    assert sender.tokens(TWO.ticket) == list(range(7, 16))
    sent = np.concatenate([chunk.reshape(2, 2, -1) for _, chunk in sender.chunks[ONE.ticket]], axis=2)
    assert np.array_equal(sent.reshape(2, -1), gather(layers, "strided", [3, 1, 4, 2], 0, 60))
    assert sender.finished == {ONE.ticket: 60, TWO.ticket: 16}


def test_a_layer_leaves_before_the_next_is_there(sender: RecordingSender, layers: list[Any]) -> None:
    exporter = exporter_of(sender, layers, frame_bytes=1)
    exporter.begin(StepPlan(opened=[ONE], jobs=[job(ONE.ticket, 0, 40, (3, 1, 4), 20)]))
    exporter.layer_saved(0)
    assert sender.slabs == [(ONE.ticket, range(20), range(1)), (ONE.ticket, range(20, 40), range(1))]


def test_steps_over_the_budget_are_counted(sender: RecordingSender, layers: list[Any]) -> None:
    exporter = Exporter(
        sender,
        layers,
        "strided",
        Element.BF16,
        kernel_blocks=1,
        interleave_dims=16,
        frame_bytes=1,
        budget_ms=0.0,
    )
    run(exporter, StepPlan(opened=[ONE], jobs=[job(ONE.ticket, 0, 10, (1,))]))
    run(exporter, StepPlan())
    assert exporter.steps_over_budget == 1


def test_blocks_of_several_kernel_blocks_are_taken_apart(sender: RecordingSender, layers: list[Any]) -> None:
    exporter = exporter_of(sender, layers, kernel_blocks=2)
    run(exporter, StepPlan(opened=[ONE], jobs=[job(ONE.ticket, 0, 60, (3, 1))]))
    ((_, chunk),) = sender.chunks[ONE.ticket]
    assert np.array_equal(chunk, gather(layers, "strided", [6, 7, 2, 3], 0, 60))


def test_a_failure_stays_with_its_transfer_and_is_reported_once(sender: RecordingSender, layers: list[Any]) -> None:
    exporter = exporter_of(sender, layers)
    run(
        exporter,
        StepPlan(
            opened=[ONE, TWO],
            jobs=[job(ONE.ticket, 0, 60, (3,)), job(TWO.ticket, 0, 10, (2,))],
            ended={ONE.ticket: 60, TWO.ticket: 10},
        ),
    )
    assert "export failed" in sender.aborted[ONE.ticket]
    assert sender.finished == {TWO.ticket: 10}
    assert list(exporter.report()[1]) == [ONE.ticket]
    assert exporter.report() == (0, {})


def test_a_refused_chunk_ends_the_transfer_here(sender: RecordingSender, layers: list[Any]) -> None:
    exporter = exporter_of(sender, layers)
    sender.refuse = True
    run(exporter, StepPlan(opened=[ONE], jobs=[job(ONE.ticket, 0, 60, (3, 1, 4, 2), 20)], ended={ONE.ticket: 60}))
    assert not sender.finished
    assert exporter.report()[1] == {ONE.ticket: "link is down"}


def test_a_transfer_that_cannot_be_opened_fails_alone(sender: RecordingSender, layers: list[Any]) -> None:
    exporter = exporter_of(sender, layers)
    exporter.begin(StepPlan(opened=[ONE]))
    exporter.begin(StepPlan(opened=[ONE, TWO]))
    assert list(exporter.report()[1]) == [ONE.ticket]
    exporter.export(StepPlan(ended={TWO.ticket: 0}))
    assert sender.finished == {TWO.ticket: 0}


def test_an_abort_is_passed_on_once(sender: RecordingSender, layers: list[Any]) -> None:
    exporter = exporter_of(sender, layers)
    exporter.begin(StepPlan(opened=[ONE]))
    exporter.settle(StepPlan(aborted={ONE.ticket: "gone", TWO.ticket: "never opened"}))
    assert sender.aborted == {ONE.ticket: "gone"}
    exporter.close()
    assert sender.closed
