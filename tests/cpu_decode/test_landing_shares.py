"""KV from several ranks, by real senders and sockets, becomes the chunks that one rank's would."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from cpu_decode.landing import LandingPlace, LandingPool
from cpu_decode.state import ChunkState, state_bytes
from tests.cpu_decode.native_kv import elements_of
from tests.e2e.transplant import as_fp32
from tests.transfer.kv_plane import GEOMETRY as SMALL
from tests.transfer.kv_plane import Worker, make_ticket
from transfer.codecs import CODECS, landing_codecs
from transfer.errors import LinkError
from transfer.frames import Element
from transfer.geometry import KVGeometry
from transfer.sender import KVSender
from transfer.shares import Share, whole

# Heads that rows_* can rotate.
GEOMETRY = msgspec.structs.replace(SMALL, num_kv_heads=4, head_dim_k=64, head_dim_v=64)
LAYERS, HEADS, DIM = GEOMETRY.num_layers, 4, 64
CHUNK_TOKENS, TOKENS = 8, 8 * 8 + 3
CREDIT_CHUNKS = 2
# A layer of a chunk, or two of half the heads.
FRAME_BYTES = 1 << 13


def share(heads: tuple[int, int], layers: tuple[int, int] = (0, LAYERS)) -> Share:
    return Share(first_kv_head=heads[0], num_kv_heads=heads[1], first_layer=layers[0], num_layers=layers[1])


SPLITS = {
    "tensor": [share((0, 1)), share((1, 1)), share((2, 2))],
    "pipeline": [share((0, 4), (0, 2)), share((0, 4), (2, 1))],
    "both": [share(heads, layers) for heads in ((0, 2), (2, 2)) for layers in ((0, 1), (1, 2))],
}


class Place:
    """A ticket's landing place behind a receiver, whose chunks are injected as soon as they are complete."""

    def __init__(self, codec: str, cell_type: str, geometry: KVGeometry = GEOMETRY) -> None:
        self.geometry = geometry
        self.worker = Worker(geometry=geometry, frame_bytes=FRAME_BYTES)
        self.pool = LandingPool(
            geometry, cell_type, CHUNK_TOKENS, CREDIT_CHUNKS * state_bytes(geometry, CHUNK_TOKENS, cell_type)
        )
        self.pool.reserve(CREDIT_CHUNKS)
        self.ticket = msgspec.structs.replace(
            make_ticket(self.worker.endpoint, codec=codec, credit_chunks=CREDIT_CHUNKS), chunk_tokens=CHUNK_TOKENS
        )
        self.states: list[bytes] = []
        self.reports: list[object] = []
        self.errors: list[Exception] = []
        self.landing = LandingPlace(
            geometry,
            cell_type,
            codec,
            self.pool,
            num_tokens=TOKENS,
            chunk_tokens=CHUNK_TOKENS,
            credit_chunks=CREDIT_CHUNKS,
            on_chunk=self.inject,
            on_end=self.reports.append,
            on_fail=self.errors.append,
        )
        self.worker.receiver.expect(self.ticket.ticket, self.landing, CREDIT_CHUNKS)
        self.senders: list[KVSender] = []

    def inject(self, chunk: ChunkState) -> None:
        assert self.pool.in_use <= CREDIT_CHUNKS
        self.states.append(chunk.buffer[: chunk.num_bytes].tobytes())
        self.pool.give_back(chunk.buffer)
        self.landing.credit_chunks += 1
        self.worker.receiver.grant(self.ticket.ticket, self.landing.credit_chunks)

    def send(self, held: Share, kv: np.ndarray, *, until: int = TOKENS) -> KVSender:
        """What one rank does: ``kv`` is uint16 ``[layers, 2, tokens, heads, dim]`` of the whole model."""
        sender = KVSender(
            self.geometry,
            max_backlog_bytes=1 << 22,
            frame_bytes=FRAME_BYTES,
            share=None if held == whole(self.geometry) else held,
        )
        self.senders.append(sender)
        sender.open(self.ticket)
        own = kv[held.layers.start : held.layers.stop, :, :, held.kv_heads.start : held.kv_heads.stop]
        for start in range(0, until, CHUNK_TOKENS):
            tokens = range(start, min(start + CHUNK_TOKENS, TOKENS))
            rows = np.ascontiguousarray(own[:, :, tokens.start : tokens.stop]).reshape(held.num_layers, -1)
            assert sender.submit(self.ticket.ticket, tokens, 0, rows, Element.BF16, 1)
        if until == TOKENS:
            sender.finish(self.ticket.ticket, TOKENS)
        return sender

    def failure(self, sender: KVSender) -> str:
        """Why the transfer has failed for one sender."""
        failed: dict[str, str] = {}
        assert self.worker.run_until(lambda: failed.update(sender.take_failed()) or failed)
        return failed[self.ticket.ticket]

    def run_until_over(self) -> None:
        assert self.worker.run_until(lambda: self.reports or self.errors)

    def close(self) -> None:
        for sender in self.senders:
            sender.close()
        self.worker.close()


@pytest.fixture
def place(request: pytest.FixtureRequest):
    places = [Place(*getattr(request, "param", ("raw", "f16")))]
    yield places[0]
    places[0].close()


@pytest.fixture(scope="module")
def kv() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0x3E00, 0x4000, (LAYERS, 2, TOKENS, HEADS, DIM), dtype=np.uint16)


def landed_whole(codec: str, cell_type: str, kv: np.ndarray) -> list[bytes]:
    place = Place(codec, cell_type)
    try:
        place.send(whole(GEOMETRY), kv)
        place.run_until_over()
        assert not place.errors
        return place.states
    finally:
        place.close()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("place", [(name, codec.lands_in[0]) for name, codec in CODECS.items()], indirect=True)
def test_what_ranks_send_lands_as_if_one_had_sent_it(place, kv, split):
    codec = place.ticket.codec
    for held in SPLITS[split]:
        place.send(held, kv)
    place.run_until_over()
    assert not place.errors
    wanted = landed_whole(codec, CODECS[codec].lands_in[0], kv)
    if codec.startswith("kvz") and split != "pipeline":
        # Steps are of a frame's planes, so those of fewer heads are finer or coarser.
        assert [len(state) for state in place.states] == [len(state) for state in wanted]
    else:
        assert place.states == wanted
    assert place.pool.in_use == 0
    assert place.worker.receiver.open_tickets == 0
    report = place.reports[0].sender
    assert report.num_tokens == TOKENS
    assert report.kv_raw_bytes == kv.nbytes
    assert place.worker.run_until(lambda: all(sender.backlog_bytes == 0 for sender in place.senders))
    assert all(sender.take_failed() == {} for sender in place.senders)


@pytest.mark.parametrize("codec", ["q8", "k8v4"])
def test_ranks_whose_rows_end_inside_a_block_send_odd_chunks_as_they_are(codec):
    # Offered for 160 elements a token; each rank has 80 of them.
    geometry = msgspec.structs.replace(GEOMETRY, num_kv_heads=2, head_dim_k=80, head_dim_v=80)
    assert codec in landing_codecs("bf16", geometry)
    kv = np.random.default_rng(1).integers(0x3E00, 0x4000, (LAYERS, 2, TOKENS, 2, 80), dtype=np.uint16)
    place = Place(codec, "bf16", geometry)
    try:
        for head in range(2):
            place.send(share((head, 1)), kv)
        place.run_until_over()
        assert not place.errors
        landed = [
            elements_of(np.frombuffer(state, np.uint8), geometry, min(CHUNK_TOKENS, TOKENS - start)).reshape(
                LAYERS, 2, -1, 2, 80
            )
            for start, state in zip(range(0, TOKENS, CHUNK_TOKENS), place.states, strict=True)
        ]
        assert np.array_equal(landed[-1], kv[:, :, -(TOKENS % CHUNK_TOKENS) :])
        found, sent = (as_fp32(each, "bf16") for each in (np.concatenate(landed, axis=2), kv))
        assert 0 < np.abs(found - sent).max() < 0.16 * np.abs(sent).max()
        assert place.pool.in_use == 0
    finally:
        place.close()


def test_no_chunk_is_complete_before_the_last_rank_has_filled_it(place, kv):
    first, *others = SPLITS["tensor"]
    sender = place.send(first, kv)
    assert place.worker.run_until(lambda: place.pool.in_use == CREDIT_CHUNKS)
    for held in others[:-1]:
        place.send(held, kv)
    assert not place.worker.run_until(lambda: place.states or place.errors or place.reports, patience_s=0.3)
    assert sender.backlog_bytes > 0
    place.send(others[-1], kv)
    place.run_until_over()
    assert len(place.states) == -(-TOKENS // CHUNK_TOKENS)


def test_a_rank_that_gives_up_fails_the_transfer_for_all(place, kv):
    first, second, third = (place.send(held, kv, until=24) for held in SPLITS["tensor"])
    assert place.worker.run_until(lambda: len(place.states) == 3)
    second.abort(place.ticket.ticket, "out of staging")
    place.run_until_over()
    assert isinstance(place.errors[0], LinkError)
    assert "out of staging" in str(place.errors[0])
    for sender in (first, third):
        assert "out of staging" in place.failure(sender)
        assert sender.backlog_bytes == 0
    assert place.pool.in_use == 0
    assert place.worker.receiver.open_tickets == 0


def test_a_rank_whose_kv_cannot_be_carried_fails_the_transfer_for_all(place, kv):
    broken = kv.copy()
    broken[1, 1, 10, 3, 5] = 0x7F80
    senders = [place.send(held, broken) for held in SPLITS["tensor"]]
    place.run_until_over()
    assert not place.reports
    for sender in senders:
        assert place.failure(sender)
        assert sender.backlog_bytes == 0
    assert place.pool.in_use == 0


def test_a_rank_that_never_comes_leaves_nothing_behind(place, kv):
    senders = [place.send(held, kv) for held in SPLITS["tensor"][:2]]
    assert place.worker.run_until(lambda: place.pool.in_use == CREDIT_CHUNKS)
    place.worker.receiver.cancel(place.ticket.ticket, "the request's deadline has passed")
    place.landing.release()
    for sender in senders:
        assert "cancelled by the decode worker" in place.failure(sender)
        assert sender.backlog_bytes == 0
    assert place.pool.in_use == 0


def test_ranks_that_cut_the_prompt_differently_are_refused(place, kv):
    first, second, _ = SPLITS["tensor"]
    place.send(first, kv, until=8)
    assert place.worker.run_until(lambda: place.pool.in_use == 1)
    other = place.send(second, kv, until=0)
    rows = np.ascontiguousarray(kv[:, :, :4, 1:2]).reshape(LAYERS, -1)
    other.submit(place.ticket.ticket, range(4), 0, rows, Element.BF16, 1)
    place.run_until_over()
    assert "from another rank" in str(place.errors[0])
    assert place.pool.in_use == 0
