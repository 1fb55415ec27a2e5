import tracemalloc

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.golden.examples import GEOMETRY
from tests.transfer import codec_reference as reference
from tests.transfer.ggml_rows import through_ggml
from transfer.codecs import CELL_ELEMENT, CODECS, by_name, by_wire_id, for_cells, landing_codecs
from transfer.errors import CodecError
from transfer.frames import Element
from transfer.layout import CELL_ROWS, Slab

KINDS = {"bf16": Element.BF16, "f16": Element.F16}
INFINITY = {"bf16": 0x7F80, "f16": 0x7C00}
EVERY_PATTERN = np.arange(1 << 16, dtype=np.uint16)

LOSSLESS = ["raw", "lz4", "zstd"]
# Elements of a block, and the largest code, of those that quantize.
BLOCK = {"q8": 32, "k8v4": 32}
LARGEST_CODE = {"q8": 127, "k8v4": 8}

codec_names = pytest.mark.parametrize("name", landing_codecs("f16"))
plain_codec_names = pytest.mark.parametrize("name", reference.ENCODE)
source_kinds = pytest.mark.parametrize("kind", KINDS)
cell_kinds = pytest.mark.parametrize("cells", KINDS)


def planes_of(name, count):
    return reference.one_layer(count) if name == "k8v4" else [count, 0]


def encode(name, elements, kind, planes=None, tokens=None):
    planes = planes_of(name, elements.size) if planes is None else planes
    tokens = reference.tokens_of(elements.size) if tokens is None else tokens
    return bytes(CODECS[name].encode(elements, KINDS[kind], reference.slab_of(planes, tokens)))


def decode(name, payload, kind, cells, planes, tokens=None):
    planes = planes_of(name, planes) if isinstance(planes, int) else planes
    tokens = reference.tokens_of(sum(planes)) if tokens is None else tokens
    outs = [np.full(plane, 0xDEAD, np.uint16) for plane in planes]
    CODECS[name].decode(payload, KINDS[kind], KINDS[cells], outs, tokens)
    return np.concatenate(outs) if outs else np.empty(0, np.uint16)


def is_finite(elements, kind):
    return elements & 0x7FFF < INFINITY[kind]


def finite_patterns(kind):
    return EVERY_PATTERN[is_finite(EVERY_PATTERN, kind)]


def fits(elements, kind, cells):
    """Whether each element is finite after rounding to ``cells``."""
    return is_finite(reference.decode_raw(elements.tobytes(), kind, cells), cells)


@st.composite
def elements_of(draw, kind, multiple_of=1):
    """Finite elements; runs of one exponent are as likely as wild ones."""
    count = draw(st.integers(0, 8)) * 32 if multiple_of == 32 else draw(st.integers(0, 300))
    largest = draw(st.sampled_from([INFINITY[kind] - 1, 0x4000, 0x3C00, 0x0040, 0]))
    magnitudes = draw(hnp.arrays(np.uint16, count, elements=st.integers(0, largest)))
    signs = draw(hnp.arrays(np.uint16, count, elements=st.sampled_from([0, 0x8000])))
    return magnitudes | signs


def random_elements(kind, count, seed=0):
    values = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    return reference.from_float(values, kind)


@plain_codec_names
@source_kinds
@given(data=st.data())
def test_encode_equals_the_reference(name, kind, data):
    elements = data.draw(elements_of(kind, BLOCK.get(name, 1)))
    try:
        payload = encode(name, elements, kind)
    except CodecError:  # a scale that f16 cannot hold
        assert np.abs(reference.to_float(elements, kind)).max() / LARGEST_CODE[name] >= 65520
        return
    assert payload == reference.ENCODE[name](elements, kind)


@plain_codec_names
@source_kinds
@cell_kinds
@given(data=st.data())
def test_decode_equals_the_reference(name, kind, cells, data):
    elements = data.draw(elements_of(kind, BLOCK.get(name, 1)))
    elements = elements & 0xBFFF if name in BLOCK else elements[fits(elements, kind, cells)]
    payload = reference.ENCODE[name](elements, kind)
    expected = reference.DECODE[name](payload, kind, cells)
    assert np.array_equal(decode(name, payload, kind, cells, elements.size), expected)


@pytest.mark.parametrize("name", LOSSLESS)
@source_kinds
@cell_kinds
def test_every_finite_pattern_is_converted_like_the_reference(name, kind, cells):
    elements = finite_patterns(kind)
    elements = elements[fits(elements, kind, cells)]
    payload = encode(name, elements, kind)
    expected = reference.decode_raw(elements.tobytes(), kind, cells)
    assert np.array_equal(decode(name, payload, kind, cells, elements.size), expected)


@source_kinds
@cell_kinds
def test_conversion_equals_torch(kind, cells):
    torch = pytest.importorskip("torch")
    types = {"bf16": torch.bfloat16, "f16": torch.float16}
    elements = finite_patterns(kind)
    elements = elements[fits(elements, kind, cells)]
    theirs = torch.from_numpy(elements.view(np.int16)).view(types[kind]).to(types[cells])
    ours = decode("raw", elements.tobytes(), kind, cells, elements.size)
    assert np.array_equal(ours, theirs.view(torch.int16).numpy().view(np.uint16))


@pytest.mark.parametrize("name", LOSSLESS)
@source_kinds
@cell_kinds
def test_every_pattern_without_a_finite_value_is_refused(name, kind, cells):
    patterns = EVERY_PATTERN[~is_finite(EVERY_PATTERN, kind)]
    finite = finite_patterns(kind)
    too_large = finite[~fits(finite, kind, cells)]
    for pattern in np.concatenate([patterns, too_large[:: max(1, too_large.size // 500)], too_large[:1]]):
        elements = np.array([0, pattern, 0], np.uint16)
        with pytest.raises(CodecError, match="infinity"):
            decode(name, reference.ENCODE[name](elements, kind), kind, cells, 3)


@pytest.mark.parametrize("name", [name for name in landing_codecs("f16") if name != "raw"])
@source_kinds
def test_encode_refuses_every_infinity_and_nan(name, kind):
    for pattern in EVERY_PATTERN[~is_finite(EVERY_PATTERN, kind)]:
        elements = np.zeros(64, np.uint16)
        elements[40] = pattern
        with pytest.raises(CodecError, match="infinity"):
            encode(name, elements, kind)


@pytest.mark.parametrize("name", LOSSLESS)
@source_kinds
@given(data=st.data())
def test_lossless_codecs_are_lossless(name, kind, data):
    elements = data.draw(elements_of(kind))
    assert np.array_equal(decode(name, encode(name, elements, kind), kind, kind, elements.size), elements)


@source_kinds
@given(data=st.data())
def test_q8_is_within_half_a_step_of_every_element(kind, data):
    elements = data.draw(elements_of(kind, 32)) & 0xBFFF
    values = reference.to_float(elements, kind).astype(np.float64)
    decoded = decode("q8", encode("q8", elements, kind), kind, "bf16", elements.size)
    error = np.abs(reference.to_float(decoded, "bf16") - values).reshape(-1, 32)
    amax = np.abs(values).reshape(-1, 32).max(axis=1, keepdims=True)
    # Half a step; the f16 scale's rounding (at least half its smallest subnormal) times the code; bf16's rounding.
    bound = amax / 254 + np.maximum(amax * 2**-11, 127 * 2**-25) + amax * 2**-8
    assert (error <= bound * (1 + 1e-6)).all()


@source_kinds
@cell_kinds
def test_q8_keeps_zeros_and_signs(kind, cells):
    elements = np.zeros(64, np.uint16)
    elements[3], elements[4] = reference.from_float(np.array([127.0, -127.0], np.float32), kind)
    decoded = reference.to_float(decode("q8", encode("q8", elements, kind), kind, cells, 64), cells)
    assert decoded[3] == 127
    assert decoded[4] == -127
    assert np.count_nonzero(decoded) == 2


@source_kinds
def test_q8_equals_the_reference_for_every_element_under_every_amax(kind):
    # One octave of amax stands for all: scale and element shift together. Nine octaves below it round to 0.
    one, octave = {"bf16": (0x3F80, 128), "f16": (0x3C00, 1024)}[kind]
    for amax in range(one, one + octave):
        smaller = np.arange(amax - 9 * octave, amax + 1, dtype=np.uint16)
        smaller = np.pad(smaller, (0, -smaller.size % 31)).reshape(-1, 31)
        elements = np.insert(smaller, 0, amax, axis=1)
        elements[:, 1::2] |= 0x8000
        assert encode("q8", elements.reshape(-1), kind) == reference.encode_q8(elements.reshape(-1), kind)


@pytest.mark.parametrize(("name", "row", "block_bytes"), [("q8", "q8_0", 34), ("k8v4", "q4_0", 18)])
def test_quantized_rows_equal_ggmls(name, row, block_bytes):
    rng = np.random.default_rng(1)
    # Blocks of every size whose values fit f16, magnitudes spread over each block; some of zeros of both signs.
    values = rng.standard_normal((4096, 32)) * np.exp2(rng.uniform(-20, 12, (4096, 1)))
    values[::100] = np.copysign(0, values[::100])
    elements = reference.from_float(values.astype(np.float32).reshape(-1), "bf16")
    blocks, back = through_ggml(row, block_bytes, reference.to_float(elements, "bf16"))
    planes = [elements.size, 0] if name == "q8" else [0, elements.size]
    payload = np.frombuffer(encode(name, elements, "bf16", planes), np.uint8)
    assert np.array_equal(payload[:8192].reshape(4096, 2), blocks[:, :2])
    assert np.array_equal(payload[8192:].reshape(4096, -1), blocks[:, 2:])
    ours = decode(name, payload.data, "bf16", "f16", planes)
    assert np.array_equal(ours, back.astype(np.float16).view(np.uint16))


@source_kinds
def test_q4_equals_the_reference_for_every_element_under_every_amax(kind):
    one, octave = {"bf16": (0x3F80, 128), "f16": (0x3C00, 1024)}[kind]
    for amax in range(one, one + octave):
        # Six octaves below amax everything rounds to 0. Its opposite follows it, then goes before it.
        smaller = np.arange(amax - 6 * octave, amax + 1, dtype=np.uint16)
        smaller = np.pad(smaller, (0, -smaller.size % 31)).reshape(-1, 31)
        elements = np.insert(smaller, 0, amax, axis=1)
        elements[:, 1::2] |= 0x8000
        elements[::2] ^= 0x8000
        encoded = encode("k8v4", elements.reshape(-1), kind, [0, elements.size])
        assert encoded == reference.encode_q4(elements.reshape(-1), kind)


@codec_names
@source_kinds
@cell_kinds
@example(payload=b"", sizes=[])
@given(payload=st.binary(max_size=400), sizes=st.lists(st.integers(0, 4).map(lambda blocks: 32 * blocks), max_size=4))
def test_arbitrary_payloads_decode_or_raise_codec_error(name, kind, cells, payload, sizes):
    try:
        decoded = decode(name, payload, kind, cells, sizes)
    except CodecError:
        return
    assert is_finite(decoded, cells).all()


@codec_names
@source_kinds
@cell_kinds
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=8))
def test_damaged_payloads_decode_or_raise_codec_error(name, kind, cells, flips):
    payload = bytearray(encode(name, random_elements(kind, 256), kind))
    for at, mask in flips:
        payload[at % len(payload)] ^= mask
    try:
        decoded = decode(name, payload, kind, cells, 256)
    except CodecError:
        return
    assert is_finite(decoded, cells).all()


@codec_names
@cell_kinds
@pytest.mark.parametrize("change", [-1, 1, 7])
def test_payloads_of_another_length_are_refused(name, cells, change):
    payload = encode(name, random_elements("bf16", 64), "bf16")
    with pytest.raises(CodecError):
        decode(name, payload + bytes(change) if change > 0 else payload[:change], "bf16", cells, 64)


@pytest.mark.parametrize("name", [*LOSSLESS, "q8"])
@cell_kinds
@given(cuts=st.lists(st.integers(0, 8), max_size=4))
def test_destinations_may_be_split(name, cells, cuts):
    payload = encode(name, random_elements("bf16", 256), "bf16")
    edges = [0, *sorted(32 * cut for cut in cuts), 256]
    sizes = np.diff(edges)
    assert np.array_equal(decode(name, payload, "bf16", cells, sizes), decode(name, payload, "bf16", cells, 256))


@codec_names
@cell_kinds
def test_payloads_may_be_read_only_and_unaligned(name, cells):
    payload = encode(name, random_elements("bf16", 64), "bf16")
    expected = decode(name, payload, "bf16", cells, 64)
    shifted = memoryview(b"x" + payload)[1:]
    assert np.array_equal(decode(name, shifted, "bf16", cells, 64), expected)


def test_k8v4_quantizes_each_plane_on_its_own():
    planes = [random_elements("bf16", count, seed) for seed, count in enumerate([64, 160, 64, 160])]
    sizes = [plane.size for plane in planes]
    payload = encode("k8v4", np.concatenate(planes), "bf16", sizes)
    layers = [
        reference.encode_q8(k, "bf16") + reference.encode_q4(v, "bf16")
        for k, v in zip(planes[::2], planes[1::2], strict=True)
    ]
    assert payload == b"".join(layers)
    decoded = decode("k8v4", payload, "bf16", "f16", sizes)
    alone = [decode("k8v4", layer, "bf16", "f16", sizes[at : at + 2]) for layer, at in zip(layers, (0, 2), strict=True)]
    assert np.array_equal(decoded, np.concatenate(alone))


@pytest.mark.parametrize("planes", [[33, 32], [32, 33], [16, 16]])
def test_k8v4_refuses_planes_that_are_no_whole_blocks(planes):
    with pytest.raises(CodecError, match="32"):
        encode("k8v4", np.zeros(sum(planes), np.uint16), "bf16", planes, range(1))
    with pytest.raises(CodecError, match="32"):
        decode("k8v4", bytes(52), "bf16", "f16", planes)


@pytest.mark.parametrize("count", [1, 31, 33, 63])
def test_q8_refuses_sizes_that_are_no_multiple_of_32(count):
    with pytest.raises(CodecError, match="32"):
        encode("q8", np.zeros(count, np.uint16), "bf16")
    with pytest.raises(CodecError, match="32"):
        decode("q8", bytes(68), "bf16", "f16", [count, 64 - count])


def test_q8_refuses_a_scale_beyond_f16():
    elements = reference.from_float(np.full(32, 127 * 65536.0, np.float32), "bf16")
    with pytest.raises(CodecError, match="too large"):
        encode("q8", elements, "bf16")


def test_raw_payload_is_a_view():
    elements = random_elements("bf16", 64)
    payload = CODECS["raw"].encode(elements, Element.BF16, reference.slab_of([32, 32], range(1)))
    assert np.shares_memory(np.frombuffer(payload, np.uint16), elements)


def test_lz4_shrinks_real_looking_bf16():
    elements = random_elements("bf16", 1 << 14)
    assert len(encode("lz4", elements, "bf16")) < 0.9 * elements.nbytes


def zstd_payload(count, frame):
    """A payload of ``count`` elements whose high plane is ``frame``."""
    return len(frame).to_bytes(4, "little") + bytes(count) + frame


def test_zstd_shrinks_real_looking_bf16_more_than_lz4():
    elements = random_elements("bf16", 1 << 14)
    assert len(encode("zstd", elements, "bf16")) < 0.8 * len(encode("lz4", elements, "bf16"))


@pytest.mark.parametrize("declared", [0, 63, 65, 1 << 40])
def test_zstd_refuses_another_declared_size_before_it_allocates(declared):
    # A frame header by hand (RFC 8878, 3.1.1.1): single segment, content size in 8 bytes; then an empty last block.
    frame = b"\x28\xb5\x2f\xfd" + b"\xe0" + declared.to_bytes(8, "little") + b"\x01\x00\x00"
    with pytest.raises(CodecError, match=f"declares {declared} bytes, not 64"):
        decode("zstd", zstd_payload(64, frame), "bf16", "bf16", 64)


def test_zstd_refuses_a_frame_of_unknown_size_and_bytes_after_a_frame():
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64))
    with pytest.raises(CodecError, match="declares -1"):
        decode("zstd", zstd_payload(64, unsized), "bf16", "bf16", 64)
    frame = zstandard.ZstdCompressor().compress(bytes(64))
    with pytest.raises(CodecError, match="unused data"):
        decode("zstd", zstd_payload(64, frame + frame), "bf16", "bf16", 64)


def test_codecs_are_found_by_name_and_number():
    for codec in CODECS.values():
        assert by_name(codec.name) is codec
        assert by_wire_id(codec.wire_id) is codec
    with pytest.raises(CodecError, match="raw, lz4, q8, zstd, k8v4, kvz1, kvz2, kvz3, rows_q8_0, rows_k8v4, rows_q4_0"):
        by_name("snappy")
    with pytest.raises(CodecError, match="99"):
        by_wire_id(99)


def test_each_cell_type_has_its_codecs():
    assert landing_codecs("f16") == landing_codecs("bf16") == tuple(CODECS)[:8]
    assert landing_codecs("f16")[0] == "raw"
    assert [landing_codecs(cells) for cells in ("q8_0", "k8v4", "q4_0")] == [
        ("rows_q8_0",),
        ("rows_k8v4",),
        ("rows_q4_0",),
    ]


@st.composite
def odd_slabs(draw):
    """Few tokens of few heads of the sizes that models have; K and V may differ."""
    head_dim_k, head_dim_v = (draw(st.sampled_from([64, 80, 96, 128, 256])) for _ in range(2))
    heads = draw(st.integers(1, 3))
    geometry = msgspec.structs.replace(GEOMETRY, num_kv_heads=heads, head_dim_k=head_dim_k, head_dim_v=head_dim_v)
    start = draw(st.integers(0, 5))
    return Slab(geometry, draw(st.integers(1, 2)), range(start, start + draw(st.integers(1, 5))))


def outs_of(name, slab):
    """A destination for each plane in the first kind of cells that the codec lands in."""
    cell_type = CODECS[name].lands_in[0]
    forms = CELL_ROWS[cell_type] * slab.num_layers
    sizes = [count // form.block_elements * form.block_bytes for count, form in zip(slab.planes, forms, strict=True)]
    return [np.full(size // 2, 0xDEAD, np.uint16) for size in sizes], CELL_ELEMENT[cell_type]


@pytest.mark.parametrize("name", CODECS)
@source_kinds
@given(slab=odd_slabs(), scale=st.sampled_from([0, 1e-30, 1e-7, 1, 300]), seed=st.integers(0, 99))
def test_odd_shapes_land_or_are_refused_by_the_rule(name, kind, slab, scale, seed):
    values = np.random.default_rng(seed).standard_normal(sum(slab.planes)).astype(np.float32) * np.float32(scale)
    elements = reference.from_float(values, kind)
    unit = 64 if name.startswith("rows") else 32 if name in BLOCK else 1
    parts = (slab.geometry.head_dim_k, slab.geometry.head_dim_v) if unit == 64 else slab.planes
    if any(part % unit for part in parts):
        with pytest.raises(CodecError, match=f"multiples of {unit}"):
            CODECS[name].encode(elements, KINDS[kind], slab)
        return
    payload = CODECS[name].encode(elements, KINDS[kind], slab)
    outs, cells = outs_of(name, slab)
    CODECS[name].decode(payload, KINDS[kind], cells, outs, slab.tokens)
    if name.startswith("rows"):
        assert b"".join(out.tobytes() for out in outs) == bytes(payload)
        return
    landed = reference.to_float(np.concatenate(outs), "f16")
    if name in LOSSLESS:
        assert np.array_equal(landed, values_in_f16(elements, kind))
    error = np.abs(landed - reference.to_float(elements, kind)).max()
    assert error <= {"k8v4": 0.16, "kvz3": 0.5, "q8": 0.01}.get(name, 0.2) * np.abs(values).max() + 6e-5


def values_in_f16(elements, kind):
    return reference.to_float(reference.decode_raw(elements.tobytes(), kind, "f16"), "f16")


@pytest.mark.parametrize("name", ["q8", "k8v4"])
def test_planes_of_no_whole_blocks_are_refused_at_both_ends(name):
    # One token of one head of 80: 80 is no multiple of 32, though K and V together are.
    geometry = msgspec.structs.replace(GEOMETRY, num_kv_heads=1, head_dim_k=80, head_dim_v=80)
    slab = Slab(geometry, 1, range(1))
    with pytest.raises(CodecError, match="multiples of 32 elements, not 80"):
        CODECS[name].encode(np.zeros(160, np.uint16), Element.BF16, slab)
    with pytest.raises(CodecError, match="multiples of 32 elements, not 80"):
        CODECS[name].decode(bytes(170), Element.BF16, Element.F16, [np.empty(80, np.uint16)] * 2, range(1))


@pytest.mark.parametrize("name", CODECS)
@given(flips=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 255)), max_size=4), cut=st.integers(0, 5000))
def test_decoding_takes_no_more_memory_than_its_destinations_allow(name, flips, cut):
    # Damage at the front, where lengths are declared.
    geometry = msgspec.structs.replace(GEOMETRY, num_kv_heads=2, head_dim_k=64, head_dim_v=64)
    slab = Slab(geometry, 2, range(64))
    elements = random_elements("bf16", sum(slab.planes))
    payload = bytearray(CODECS[name].encode(elements, Element.BF16, slab))
    for at, mask in flips:
        payload[at] ^= mask
    payload = payload[: len(payload) - cut]
    outs, cells = outs_of(name, slab)
    tracemalloc.start()
    try:
        CODECS[name].decode(payload, Element.BF16, cells, outs, slab.tokens)
    except CodecError:
        pass
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_bytes <= 2 * elements.nbytes + 65536


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("cells", CELL_ROWS)
def test_a_codec_is_given_only_for_cells_that_it_lands_in(name, cells):
    if name in landing_codecs(cells):
        assert for_cells(name, cells) is CODECS[name]
    else:
        with pytest.raises(CodecError, match=f"{name} cannot land in {cells} cells; use {landing_codecs(cells)[0]}"):
            for_cells(name, cells)


@pytest.mark.parametrize(("name", "odd"), [("q8", "raw"), ("k8v4", "raw"), ("lz4", "lz4"), ("rows_q8_0", "rows_q8_0")])
def test_a_frame_that_ends_inside_a_block_goes_by_raw(name, odd):
    assert CODECS[name].of_frame((64, 96, 64, 96)) is CODECS[name]
    assert CODECS[name].of_frame((64, 80, 64, 80)) is CODECS[odd]


@pytest.mark.parametrize(("num_kv_heads", "fits"), [(1, False), (2, True), (3, False)])
def test_codecs_of_blocks_are_not_offered_where_a_token_may_end_inside_one(num_kv_heads, fits):
    geometry = msgspec.structs.replace(GEOMETRY, num_kv_heads=num_kv_heads, head_dim_k=80, head_dim_v=80)
    offered = landing_codecs("f16", geometry)
    assert {"raw", "lz4", "zstd", "kvz1"} <= set(offered)
    for name in ("q8", "k8v4"):
        assert (name in offered) == fits
        if not fits:
            with pytest.raises(CodecError, match=f"{name} cannot land in f16 cells of rows that 32 does not divide"):
                for_cells(name, "f16", geometry)
