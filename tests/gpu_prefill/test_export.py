from __future__ import annotations

import threading
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gpu_prefill.export import Exporter  # noqa: E402
from gpu_prefill.extract import Layer, gather  # noqa: E402
from gpu_prefill.schedule import Job, StepPlan  # noqa: E402
from gpu_prefill.staging import Staging  # noqa: E402
from gpu_prefill.streams import HostStreams  # noqa: E402
from tests.gpu_prefill.recorder import RecordingSender, make_ticket  # noqa: E402
from transfer.codecs import by_name  # noqa: E402
from transfer.frames import Element  # noqa: E402
from transfer.geometry import KVGeometry  # noqa: E402
from transfer.layout import Slab  # noqa: E402

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
    caches = torch.randn((2, 8, 2, 16, 32), generator=torch.Generator().manual_seed(1)).bfloat16()
    return [Layer(cache) for cache in caches]


@pytest.fixture(params=["copied", "staged"])
def sender(request: pytest.FixtureRequest) -> RecordingSender:
    """The exporter of one that is ``staged`` goes the way that devices do."""
    sender = RecordingSender(GEOMETRY)
    sender.staged = request.param == "staged"
    return sender


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
        staging=staging_of(64 << 10) if sender.staged else None,
    )


def staging_of(host_bytes: int) -> Staging:
    return Staging(HostStreams(), torch.device("cpu"), slot_bytes=16 << 10, host_bytes=host_bytes)


def delivered(exporter: Exporter) -> None:
    """Wait until all that was staged has come to the sender."""
    if exporter._staging is not None:
        over = threading.Event()
        exporter._staging.after(over.set)
        assert over.wait(20)


def run(exporter: Exporter, plan: StepPlan, hooks: int = 0) -> None:
    """One step of which the hooks of the first layers come."""
    exporter.begin(plan)
    for layer in range(hooks):
        exporter.layer_saved(layer)
    exporter.export(plan)
    delivered(exporter)


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
    delivered(exporter)
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
    # Of what was staged the refusal comes after END was queued; the real sender knows that transfer no more.
    assert bool(sender.finished) == sender.staged
    assert exporter.report()[1] == {ONE.ticket: "link is down"}


def test_a_transfer_that_cannot_be_opened_fails_alone(sender: RecordingSender, layers: list[Any]) -> None:
    exporter = exporter_of(sender, layers)
    exporter.begin(StepPlan(opened=[ONE]))
    exporter.begin(StepPlan(opened=[ONE, TWO]))
    assert list(exporter.report()[1]) == [ONE.ticket]
    exporter.export(StepPlan(ended={TWO.ticket: 0}))
    delivered(exporter)
    assert sender.finished == {TWO.ticket: 0}


def test_an_abort_is_passed_on_once(sender: RecordingSender, layers: list[Any]) -> None:
    exporter = exporter_of(sender, layers)
    exporter.begin(StepPlan(opened=[ONE]))
    exporter.settle(StepPlan(aborted={ONE.ticket: "gone", TWO.ticket: "never opened"}))
    assert sender.aborted == {ONE.ticket: "gone"}
    exporter.close()
    assert sender.closed


@pytest.fixture
def staged() -> RecordingSender:
    sender = RecordingSender(GEOMETRY)
    sender.staged = True
    return sender


def with_codec(codec: str) -> Any:
    return make_ticket(1, codec=codec)


def test_codecs_of_the_device_are_made_there_and_the_others_are_not(staged: RecordingSender, layers: list[Any]) -> None:
    whole = gather(layers, "strided", [3, 1, 4, 2], 0, 60)
    exporter = exporter_of(staged, layers, frame_bytes=1)
    run(exporter, StepPlan(opened=[with_codec("q8")], jobs=[job(ONE.ticket, 0, 60, (3, 1, 4, 2))]))
    for layer, (tokens, first, payload) in enumerate(staged.payloads[ONE.ticket]):
        assert (tokens, first) == (range(60), layer)
        wanted = by_name("q8").encode(whole[layer], Element.BF16, Slab(GEOMETRY, 1, tokens))
        assert payload.tobytes() == bytes(wanted)
    exporter = exporter_of(staged, layers)
    staged.opened.clear()
    run(exporter, StepPlan(opened=[with_codec("kvz2")], jobs=[job(ONE.ticket, 0, 60, (3, 1, 4, 2))]))
    assert np.array_equal(np.concatenate([chunk for _, chunk in staged.chunks[ONE.ticket]]), whole)


def test_chunks_that_end_inside_a_block_leave_the_device_as_they_are(layers: list[Any]) -> None:
    # A rank's only head: a token is half a block.
    layers = [Layer(layer.cache[:, :1]) for layer in layers]
    staged = RecordingSender(msgspec.structs.replace(GEOMETRY, num_kv_heads=1))
    staged.staged = True
    exporter = exporter_of(staged, layers)
    run(exporter, StepPlan(opened=[with_codec("q8")], jobs=[job(ONE.ticket, 0, 45, (3, 1, 4), 20)]))
    encoded = [(tokens, first) for tokens, first, _ in staged.payloads[ONE.ticket]]
    assert encoded == [(range(20), 0), (range(20, 40), 0), (range(20), 1), (range(20, 40), 1)]
    ((start, rows),) = staged.chunks[ONE.ticket]
    assert start == 40
    assert np.array_equal(rows, gather(layers, "strided", [3, 1, 4], 40, 45))


def test_what_a_codec_of_the_device_refuses_fails_that_transfer_only(
    staged: RecordingSender, layers: list[Any]
) -> None:
    layers[1].cache[3, 0, 2, 5] = torch.inf
    exporter = exporter_of(staged, layers)
    jobs = [job(ONE.ticket, 0, 60, (3, 1, 4, 2)), job(TWO.ticket, 0, 60, (5, 6, 7, 2))]
    run(exporter, StepPlan(opened=[with_codec("q8"), TWO], jobs=jobs, ended={TWO.ticket: 60}))
    assert staged.aborted == {ONE.ticket: "KV holds values that codec q8 cannot carry"}
    assert staged.finished == {TWO.ticket: 60}


def test_staging_that_is_full_fails_that_transfer_only_and_says_how_much_waits(
    staged: RecordingSender, layers: list[Any]
) -> None:
    exporter = exporter_of(staged, layers)
    exporter._staging = staging_of(4096)
    jobs = [job(ONE.ticket, 0, 60, (3, 1, 4, 2)), job(TWO.ticket, 0, 5, (5,))]
    run(exporter, StepPlan(opened=[ONE, TWO], jobs=jobs, ended={ONE.ticket: 60, TWO.ticket: 5}))
    assert staged.aborted[ONE.ticket].startswith("staging is full: over ")
    assert list(exporter.report()[1]) == [ONE.ticket]
    assert staged.finished == {TWO.ticket: 5}
