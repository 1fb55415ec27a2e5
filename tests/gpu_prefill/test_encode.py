from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from gpu_prefill.encode import VERDICT_BYTES, encode, encodes, payload_bytes  # noqa: E402
from tests.golden.examples import GEOMETRY  # noqa: E402
from tests.transfer import codec_reference  # noqa: E402
from transfer import codecs  # noqa: E402
from transfer.errors import CodecError  # noqa: E402
from transfer.frames import Element  # noqa: E402
from transfer.layout import Slab  # noqa: E402

CODECS = ("raw", "q8", "k8v4", "rows_q8_0", "rows_k8v4", "rows_q4_0")
DTYPES = {torch.bfloat16: Element.BF16, torch.float16: Element.F16}


def encoded(codec: str, rows: torch.Tensor) -> tuple[bytes, bool]:
    """The payload, and whether it was refused."""
    layers, _, tokens, heads, dim = rows.shape
    size = payload_bytes(codec, tokens * heads * dim, layers)
    # The next slot's bytes must stay as they are.
    out = torch.full((size + VERDICT_BYTES + 8,), 0x55, dtype=torch.uint8)
    encode(codec, rows, out[:-8])
    assert (out[-8:] == 0x55).all()
    return out[:size].numpy().tobytes(), bool(out[size:-8].any())


def wanted(codec: str, rows: torch.Tensor) -> bytes | None:
    """What the sender would make of the same rows, None if it refuses them."""
    layers, _, tokens, heads, dim = rows.shape
    geometry = msgspec.structs.replace(GEOMETRY, num_kv_heads=heads, head_dim_k=dim, head_dim_v=dim)
    elements = rows.contiguous().view(torch.int16).numpy().view(np.uint16).reshape(-1)
    slab = Slab(geometry, layers, range(tokens))
    try:
        return bytes(codecs.by_name(codec).encode(elements, DTYPES[rows.dtype], slab))
    except CodecError:
        return None


def assert_same(codec: str, rows: torch.Tensor) -> None:
    payload, refused = encoded(codec, rows)
    expected = wanted(codec, rows)
    assert refused == (expected is None)
    assert refused or payload == expected


def of_bits(bits: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(dtype)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 3, 8]),
    dim=st.sampled_from([64, 80, 96, 128, 256]),
    tokens=st.sampled_from([1, 2, 7, 33]),
    layers=st.integers(1, 3),
    span=st.sampled_from([0, 1, 4, 20]),
    zeros=st.sampled_from([0.0, 0.1, 0.97]),
    seed=st.integers(0, 1 << 32),
)
def test_encodes_what_the_sender_would(codec, dtype, heads, dim, tokens, layers, span, zeros, seed):
    if not encodes(codec, dim, heads * tokens):
        return
    rng = np.random.default_rng(seed)
    shape = (layers, 2, tokens, heads, dim)
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-span, span + 1, (*shape[:-1], 1))
    values[rng.random(shape) < zeros] *= 0.0
    assert_same(codec, torch.from_numpy(values).to(dtype))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 32), top=st.sampled_from([0x10, 0x80, 0x400, 0x5D80, 0x7C00, 0x7F80, 0x8000]))
@example(seed=0, top=1)
def test_any_bit_pattern_is_encoded_or_refused_alike(codec, dtype, seed, top):
    """Denormals, both zeros, values beyond every scale, infinities and NaN."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, top, (2, 2, 3, 2, 64), dtype=np.uint16) | (rng.integers(0, 2, (2, 2, 3, 2, 64)) << 15)
    assert_same(codec, of_bits(bits.astype(np.uint16), dtype))


@pytest.mark.parametrize("codec", CODECS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_one_element_that_is_not_finite_is_seen_wherever_it_lies(codec, dtype, value):
    for place in ((0, 0, 0, 0, 0), (1, 1, 2, 1, 63), (0, 1, 1, 0, 31)):
        rows = torch.ones((2, 2, 3, 2, 64)).to(dtype)
        assert not encoded(codec, rows)[1]
        rows[place] = value
        assert encoded(codec, rows)[1]


@pytest.mark.parametrize("extremes", [(5.0, -5.0), (-5.0, 5.0)])
def test_the_first_of_two_largest_elements_sets_the_scale(extremes):
    rows = torch.zeros((1, 2, 1, 1, 64), dtype=torch.bfloat16)
    rows[..., 3], rows[..., 20] = extremes
    for codec in ("k8v4", "rows_q4_0"):
        assert_same(codec, rows)


def test_halves_are_rounded_away_from_zero():
    steps = torch.arange(-32.0, 32.0).add(0.5)
    rows = torch.zeros((1, 2, 1, 1, 128), dtype=torch.bfloat16)
    rows[..., :64], rows[..., 96] = steps, 127.0
    rows[..., 31] = rows[..., 63] = 127.0
    assert_same("q8", rows)


def test_f32_rows_are_quantized_without_a_detour():
    rows = torch.randn((1, 2, 3, 1, 64), generator=torch.Generator().manual_seed(2))
    scales, codes = codec_reference.quantize_q8(rows.numpy().reshape(-1))
    assert encoded("q8", rows) == (scales.tobytes() + codes.tobytes(), False)


def test_encodes_only_planes_of_whole_blocks():
    assert encodes("raw", 80, 1)
    assert encodes("q8", 80, 2)
    assert not encodes("q8", 80, 1)
    assert not encodes("rows_q8_0", 80, 4)
    assert not encodes("zstd", 64, 1)
