import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.golden.examples import GEOMETRY
from tests.transfer import codec_reference as reference
from tests.transfer.ggml_rows import through_ggml
from transfer import rows
from transfer.codecs import CELL_ELEMENT, CODECS
from transfer.errors import CodecError
from transfer.frames import Element
from transfer.layout import CELL_ROWS, Slab

KINDS = {"bf16": Element.BF16, "f16": Element.F16}
LARGEST = {"bf16": 0x7F7F, "f16": 0x7BFF}
HEAD_DIMS = [64, 128, 192, 256]

names = pytest.mark.parametrize("name", reference.ROW_FORMS)
source_kinds = pytest.mark.parametrize("kind", KINDS)


def slab_of(head_dim_k, head_dim_v, heads=1, tokens=1, layers=1):
    geometry = msgspec.structs.replace(GEOMETRY, num_kv_heads=heads, head_dim_k=head_dim_k, head_dim_v=head_dim_v)
    return Slab(geometry, layers, range(3, 3 + tokens))


def encode(name, elements, kind, slab):
    return bytes(CODECS[name].encode(elements, KINDS[kind], slab))


def outs_of(name, slab):
    """A destination for each plane, as wide as its rows."""
    forms = CELL_ROWS[name.removeprefix("rows_")] * slab.num_layers
    sizes = [count // 32 * form.block_bytes for count, form in zip(slab.planes, forms, strict=True)]
    return [np.full(size // 2, 0xDEAD, np.uint16) for size in sizes]


def decode(name, payload, slab):
    outs = outs_of(name, slab)
    CODECS[name].decode(payload, Element.BF16, CELL_ELEMENT[name.removeprefix("rows_")], outs, slab.tokens)
    return b"".join(out.tobytes() for out in outs)


def random_elements(kind, count, seed=0):
    values = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    return reference.from_float(values, kind)


@st.composite
def slabs(draw):
    return slab_of(
        draw(st.sampled_from(HEAD_DIMS)),
        draw(st.sampled_from(HEAD_DIMS)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
    )


@st.composite
def elements_of(draw, slab, kind):
    """Finite elements: of one size or wild, subnormal, all zeros of both signs, or a single one among zeros."""
    count = sum(slab.planes)
    largest = draw(st.sampled_from([LARGEST[kind], 0x4000, 0x3C00, 0x0040, 0]))
    seed = draw(st.integers(0, 1 << 30))
    elements = np.random.default_rng(seed).integers(0, largest + 1, count).astype(np.uint16)
    if draw(st.booleans()):
        elements &= np.uint16(0x8000)
        elements[draw(st.integers(0, count - 1))] = largest
    return elements | draw(hnp.arrays(np.uint16, count, elements=st.sampled_from([0, 0x8000]), fill=st.just(0)))


@names
@source_kinds
@given(data=st.data())
def test_encode_equals_the_reference(name, kind, data):
    slab = data.draw(slabs())
    elements = data.draw(elements_of(slab, kind))
    try:
        payload = encode(name, elements, kind, slab)
    except CodecError:  # a scale that f16 cannot hold
        assert np.abs(reference.to_float(elements, kind)).max() * np.sqrt(256) / 8 >= 65520
        return
    assert payload == reference.encode_rows(name, elements, kind, slab)


@names
def test_rows_are_rotated_and_near_what_they_stand_for(name):
    slab = slab_of(128, 192, heads=2, tokens=5, layers=2)
    elements = random_elements("bf16", sum(slab.planes))
    elements[7] = 0x4220  # an outlier of 40: rotation spreads it
    payload, planes = encode(name, elements, "bf16", slab), slab.planes
    at = 0
    for index, plane in enumerate(np.split(elements, np.cumsum(planes)[:-1])):
        form = reference.ROW_FORMS[name][index % 2]
        block_bytes = {"8": 34, "4": 18}[form]
        part = np.frombuffer(payload, np.uint8, plane.size // 32 * block_bytes, at).reshape(-1, block_bytes)
        at += part.size
        planar = part[:, :2].tobytes() + part[:, 2:].tobytes()
        decoded = (reference.decode_q8 if form == "8" else reference.decode_q4)(planar, None, "f16")
        back = reference.rotate(reference.to_float(decoded, "f16"), 64 if index % 2 else 128)
        values = reference.to_float(plane, "bf16")
        rms_error = np.sqrt(np.mean((back - values) ** 2) / np.mean(values**2))
        assert rms_error < {"8": 0.01, "4": 0.15}[form]
    assert at == len(payload)


def test_rotation_is_by_the_hadamard_matrix():
    matrix = np.ones((1, 1))
    while len(matrix) < 128:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    values = np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)
    expected = values @ (matrix / np.sqrt(128))
    np.testing.assert_allclose(reference.rotate(values, 128).reshape(3, 128), expected, atol=1e-5)


@pytest.mark.parametrize(("head_dim", "size"), [(64, 64), (128, 128), (192, 64), (256, 256), (320, 64), (576, 64)])
def test_keys_are_rotated_by_the_largest_power_of_two_that_divides_the_head(head_dim, size):
    assert rows.rotation_elements(head_dim) == size == reference.rotation(head_dim)


@pytest.mark.parametrize(("form", "row", "block_bytes"), [("8", "q8_0", 34), ("4", "q4_0", 18)])
def test_blocks_equal_ggmls(form, row, block_bytes):
    rng = np.random.default_rng(1)
    values = rng.standard_normal((4096, 64)) * np.exp2(rng.uniform(-12, 12, (4096, 1)))
    values[::100] = np.copysign(0, values[::100])
    elements = reference.from_float(values.astype(np.float32).reshape(-1), "bf16")
    slab = slab_of(64, 64, tokens=2048)
    rotated = reference.rotate(reference.to_float(elements, "bf16"), 64)
    blocks, _ = through_ggml(row, block_bytes, rotated)
    assert encode({"8": "rows_q8_0", "4": "rows_q4_0"}[form], elements, "bf16", slab) == blocks.tobytes()


@names
@source_kinds
def test_what_is_encoded_lands_byte_for_byte(name, kind):
    slab = slab_of(128, 64, heads=3, tokens=7, layers=2)
    payload = encode(name, random_elements(kind, sum(slab.planes)), kind, slab)
    assert decode(name, payload, slab) == payload
    # Payloads may be read-only and start at an odd address.
    assert decode(name, memoryview(b"x" + payload)[1:], slab) == payload


@names
@source_kinds
@pytest.mark.parametrize("at", [0, 63, 64, 191])
def test_infinities_and_nans_are_refused(name, kind, at):
    for pattern in (LARGEST[kind] + 1, 0x7FFF, 0x8000 | (LARGEST[kind] + 1)):
        elements = random_elements(kind, 192)
        elements[at] = pattern
        with pytest.raises(CodecError, match="infinity"):
            encode(name, elements, kind, slab_of(128, 64))


@names
def test_values_beyond_f16_scales_are_refused_and_do_not_become_nan(name):
    for value in (1e9, 1e18, 1e19, 3e38):
        alternating = np.where(np.arange(128) % 2, value, -value).astype(np.float32)
        for values in (alternating, np.full(128, value, np.float32)):
            with pytest.raises(CodecError, match="too large"):
                encode(name, reference.from_float(values, "bf16"), "bf16", slab_of(64, 64))


@names
@pytest.mark.parametrize("head_dims", [(80, 64), (64, 80), (96, 96), (32, 64), (0, 64)])
def test_heads_that_llama_cpp_would_not_rotate_are_refused(name, head_dims):
    slab = slab_of(*head_dims, heads=2, tokens=2)
    with pytest.raises(CodecError, match="multiples of 64"):
        encode(name, np.zeros(sum(slab.planes), np.uint16), "bf16", slab)


@names
@pytest.mark.parametrize("half", [0x7C00, 0xFC00, 0x7E00, 0xFFFF])
def test_scales_that_are_not_finite_do_not_land(name, half):
    slab = slab_of(64, 64, tokens=2)
    payload = bytearray(encode(name, random_elements("bf16", sum(slab.planes)), "bf16", slab))
    payload[:2] = half.to_bytes(2, "little")
    with pytest.raises(CodecError, match="infinity"):
        decode(name, payload, slab)
    payload = bytearray(encode(name, random_elements("bf16", sum(slab.planes)), "bf16", slab))
    last = {"8": 34, "4": 18}[reference.ROW_FORMS[name][1]]
    payload[-last : 2 - last] = half.to_bytes(2, "little")
    with pytest.raises(CodecError, match="infinity"):
        decode(name, payload, slab)


@names
@pytest.mark.parametrize("change", [-1, 1, 34, -18])
def test_payloads_of_another_length_are_refused(name, change):
    slab = slab_of(64, 64)
    payload = encode(name, random_elements("bf16", 128), "bf16", slab)
    with pytest.raises(CodecError, match="its rows need"):
        decode(name, payload + bytes(change) if change > 0 else payload[:change], slab)


@names
def test_destinations_of_no_whole_blocks_are_refused(name):
    with pytest.raises(CodecError, match="no whole blocks"):
        CODECS[name].decode(bytes(64), Element.BF16, Element.F16, [np.empty(32, np.uint16)], range(1))


@names
@given(payload=st.binary(max_size=200), slab=slabs())
def test_arbitrary_payloads_land_or_raise_codec_error(name, payload, slab):
    exact = (payload * (1 + sum(slab.planes)))[: sum(out.nbytes for out in outs_of(name, slab))]
    for candidate in (payload, exact):
        try:
            landed = decode(name, candidate, slab)
        except CodecError:
            continue
        assert landed == candidate
