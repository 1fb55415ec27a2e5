"""Landing accepts exactly the frames that are due, and its buffers always come back."""

from __future__ import annotations

import time

import msgspec
import numpy as np
import pytest

from cpu_decode.landing import LandingPlace, LandingPool
from cpu_decode.state import ChunkState, state_bytes
from tests.cpu_decode.native_kv import elements_of
from transfer.errors import CapacityError, CodecError, ProtocolError
from transfer.frames import Element, Header, Kind
from transfer.geometry import KVGeometry
from transfer.shares import whole
from transfer.stages import SenderReport

GEOMETRY = KVGeometry(
    model_fingerprint="m",
    num_layers=4,
    num_kv_heads=2,
    head_dim_k=16,
    head_dim_v=8,
    rope_dims=16,
    rope_theta=1e4,
    rope_scaling="none",
    sliding_window=0,
    vocab_size=100,
)
TOKENS = 10
RNG = np.random.default_rng(0)


class Scene:
    def __init__(self, credit_chunks: int = 3, codec: str = "raw") -> None:
        self.pool = LandingPool(GEOMETRY, "bf16", chunk_tokens=4, max_bytes=3 * state_bytes(GEOMETRY, 4, "bf16"))
        self.chunks: list[ChunkState] = []
        self.ended: list[object] = []
        self.failed: list[object] = []
        self.place = LandingPlace(
            GEOMETRY,
            "bf16",
            codec,
            self.pool,
            num_tokens=TOKENS,
            chunk_tokens=4,
            credit_chunks=credit_chunks,
            on_chunk=self.chunks.append,
            on_end=self.ended.append,
            on_fail=self.failed.append,
        )

    def frame(self, start: int, count: int, first_layer: int, num_layers: int, **change: object) -> np.ndarray:
        per_layer = count * 2 * (16 + 8)
        elements = (RNG.integers(0, 0x7F80, num_layers * per_layer)).astype(np.uint16)
        header = Header(
            kind=Kind.DATA,
            ticket=bytes(16),
            sequence=0,
            codec=1,
            element=Element.BF16,
            start_token=start,
            num_tokens=count,
            first_layer=first_layer,
            num_layers=num_layers,
        )
        self.place.data(
            msgspec.structs.replace(header, **change),
            memoryview(elements.tobytes()),
            whole(GEOMETRY),
            time.monotonic_ns(),
        )
        return elements


def report(num_tokens: int) -> SenderReport:
    return SenderReport(num_tokens=num_tokens, num_frames=1, kv_raw_bytes=1, kv_wire_bytes=1, gather_ns=0, encode_ns=0)


def test_rows_land_where_llama_cpp_expects_them():
    scene = Scene()
    sent = [scene.frame(0, 4, 0, 3), scene.frame(0, 4, 3, 1), scene.frame(4, 4, 0, 4), scene.frame(8, 2, 0, 4)]
    scene.place.end(report(TOKENS))
    first = scene.chunks[0]
    landed = elements_of(first.buffer[: first.num_bytes].tobytes(), GEOMETRY, 4)
    assert np.array_equal(landed, np.concatenate(sent[:2]).reshape(4, -1))
    assert [(c.start_token, c.num_tokens) for c in scene.chunks] == [(0, 4), (4, 4), (8, 2)]
    assert len(scene.ended) == 1


@pytest.mark.parametrize(
    ("start", "count", "first_layer", "num_layers"),
    [(1, 4, 0, 4), (0, 5, 0, 4), (0, 0, 0, 4), (0, 4, 1, 3), (0, 4, 0, 5), (0, 4, 0, 0)],
)
def test_a_frame_that_is_not_due_is_refused(start: int, count: int, first_layer: int, num_layers: int):
    scene = Scene()
    with pytest.raises(ProtocolError):
        scene.frame(start, count, first_layer, num_layers)
    assert scene.pool.in_use == 0


def test_a_group_of_another_chunk_size_is_refused():
    scene = Scene()
    scene.frame(0, 4, 0, 2)
    with pytest.raises(ProtocolError, match="was due"):
        scene.frame(0, 3, 2, 2)


def test_another_codec_than_the_tickets_is_refused():
    with pytest.raises(ProtocolError, match="codec 3"):
        Scene().frame(0, 4, 0, 4, codec=3)


def test_raw_is_due_exactly_where_a_plane_ends_inside_a_block():
    with pytest.raises(ProtocolError, match="codec 1 where 3 was due"):
        Scene(codec="q8").frame(0, 4, 0, 4)
    scene = Scene(codec="q8")
    # V rows of three tokens are 48 elements.
    with pytest.raises(ProtocolError, match="codec 3 where 1 was due"):
        scene.frame(0, 3, 0, 4, codec=3)
    scene.frame(0, 3, 0, 4)
    assert [(c.start_token, c.num_tokens) for c in scene.chunks] == [(0, 3)]


def test_a_chunk_without_a_credit_is_refused():
    scene = Scene(credit_chunks=1)
    scene.frame(0, 4, 0, 4)
    with pytest.raises(ProtocolError, match="without a credit"):
        scene.frame(4, 4, 0, 4)


def test_chunks_of_one_step_may_take_turns_the_earlier_one_first():
    scene = Scene()
    for first_layer, num_layers in ((0, 1), (1, 2), (3, 1)):
        for start, count in ((0, 4), (4, 4), (8, 2)):
            scene.frame(start, count, first_layer, num_layers)
    scene.place.end(report(TOKENS))
    assert [(c.start_token, c.num_tokens) for c in scene.chunks] == [(0, 4), (4, 4), (8, 2)]


def test_a_later_chunk_may_not_overtake_an_earlier_one():
    scene = Scene()
    scene.frame(0, 4, 0, 1)
    with pytest.raises(ProtocolError, match="not due yet"):
        scene.frame(4, 4, 0, 2)
    scene.place.release()
    assert scene.pool.in_use == 0


def test_no_more_chunks_are_open_than_there_are_credits():
    scene = Scene(credit_chunks=2)
    scene.frame(0, 4, 0, 1)
    scene.frame(4, 4, 0, 1)
    with pytest.raises(ProtocolError, match="without a credit"):
        scene.frame(8, 2, 0, 1)


def test_an_early_end_is_refused_and_the_half_filled_buffer_comes_back():
    scene = Scene()
    scene.frame(0, 4, 0, 2)
    with pytest.raises(ProtocolError, match="0 of 10 tokens landed"):
        scene.place.end(report(TOKENS))
    scene.place.fail(CodecError("x"))
    assert scene.pool.in_use == 0
    assert len(scene.failed) == 1


def test_a_payload_that_does_not_decode_is_refused():
    scene = Scene()
    header = Header(
        kind=Kind.DATA, ticket=bytes(16), sequence=0, codec=1, element=Element.BF16, num_tokens=4, num_layers=4
    )
    with pytest.raises(CodecError):
        scene.place.data(header, memoryview(b"short"), whole(GEOMETRY), time.monotonic_ns())


def test_the_pool_never_promises_more_than_it_may_hold():
    pool = LandingPool(GEOMETRY, "bf16", chunk_tokens=4, max_bytes=3 * state_bytes(GEOMETRY, 4, "bf16"))
    assert pool.reserve(2) == 2
    assert pool.reserve(2) == 1
    with pytest.raises(CapacityError, match="landing_mib"):
        pool.reserve(1)
    pool.unreserve(1)
    assert pool.reserve(4) == 1
