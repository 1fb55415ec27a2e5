import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.transfer import codec_reference as reference
from transfer import kvz
from transfer.codecs import CODECS
from transfer.errors import CodecError
from transfer.frames import Element

KINDS = {"bf16": Element.BF16, "f16": Element.F16}

presets = pytest.mark.parametrize("name", kvz.PRESETS)
source_kinds = pytest.mark.parametrize("kind", KINDS)
cell_kinds = pytest.mark.parametrize("cells", KINDS)


def encode(name, elements, kind, planes, tokens):
    return bytes(CODECS[name].encode(elements, KINDS[kind], reference.slab_of(planes, tokens)))


def decode(name, payload, kind, cells, planes, tokens):
    outs = [np.full(plane, 0xDEAD, np.uint16) for plane in planes]
    CODECS[name].decode(payload, KINDS[kind], KINDS[cells], outs, tokens)
    return np.concatenate(outs)


@st.composite
def frames(draw, kind):
    """(elements, planes, tokens) of up to two layers; values up to 1000, some channels large, outliers among them."""
    tokens = range(draw(st.integers(0, 6)), 0)
    tokens = range(tokens.start, tokens.start + draw(st.integers(1, 12)))
    channels = [draw(st.integers(1, 9)), draw(st.integers(1, 9))] * draw(st.integers(1, 2))
    planes = [len(tokens) * count for count in channels]
    noise = draw(hnp.arrays(np.float32, sum(planes), elements=st.floats(-1, 1, width=32)))
    scale = draw(st.sampled_from([0, 1e-30, 1e-4, 1, 1000]))
    values = noise * np.float32(scale) + np.float32(draw(st.sampled_from([0, 1, 50])))
    if draw(st.booleans()):
        values[draw(st.integers(0, values.size - 1))] = 20_000
    return reference.from_float(values.astype(np.float32), kind), planes, tokens


def frame_with_outliers(kind):
    """Two planes of 1024 tokens and 8 channels; three values far out."""
    values = np.random.default_rng(2).standard_normal(16384).astype(np.float32)
    values[[100, 4000, 10_000]] = 3000, -3000, 20_000
    return reference.from_float(values, kind), [8192, 8192], range(1024)


@presets
@source_kinds
@given(data=st.data())
def test_encode_equals_the_reference(name, kind, data):
    elements, planes, tokens = data.draw(frames(kind))
    expected = reference.encode_kvz(kvz.PRESETS[name], elements, kind, planes, tokens)
    assert encode(name, elements, kind, planes, tokens) == expected


@presets
@source_kinds
@cell_kinds
@given(data=st.data())
def test_decode_equals_the_reference(name, kind, cells, data):
    elements, planes, tokens = data.draw(frames(kind))
    payload = reference.encode_kvz(kvz.PRESETS[name], elements, kind, planes, tokens)
    expected = reference.decode_kvz(payload, kind, cells, planes, tokens)
    assert np.array_equal(decode(name, payload, kind, cells, planes, tokens), expected)


@presets
@source_kinds
@given(data=st.data())
def test_no_element_is_off_by_more_than_half_a_step(name, kind, data):
    elements, planes, tokens = data.draw(frames(kind))
    payload = encode(name, elements, kind, planes, tokens)
    steps = np.repeat(np.frombuffer(payload, "<f4", len(planes), 4).astype(np.float64), planes)
    values = reference.to_float(elements, kind).astype(np.float64)
    decoded = reference.to_float(decode(name, payload, kind, "bf16", planes, tokens), "bf16")
    # On top: the rounding to bf16 (at most 2**-9 of what is rounded) and of four f32 operations.
    bound = (steps / 2 + np.abs(values) * 2**-23) * (1 + 2**-8) + np.abs(values) * 2**-8
    assert (np.abs(decoded - values) <= bound + 1e-37).all()


@presets
@source_kinds
def test_escapes_and_the_first_four_tokens_are_exact(name, kind):
    elements, planes, tokens = frame_with_outliers(kind)
    payload = encode(name, elements, kind, planes, tokens)
    decoded = decode(name, payload, kind, kind, planes, tokens)
    assert int.from_bytes(payload[:4], "little") == 3
    assert np.array_equal(decoded[[100, 4000, 10_000]], elements[[100, 4000, 10_000]])
    for plane in (0, 8192):
        assert np.array_equal(decoded[plane : plane + 32], elements[plane : plane + 32])
        assert not np.array_equal(decoded[plane + 32 : plane + 64], elements[plane + 32 : plane + 64])


def test_only_the_first_tokens_of_the_prompt_are_kept():
    elements, planes = frame_with_outliers("bf16")[0][4096:8192], [4096, 0]
    sizes = {start: len(encode("kvz1", elements, "bf16", planes, range(start, start + 512))) for start in (0, 3, 4, 99)}
    assert sizes[0] > sizes[3] > sizes[4] == sizes[99]
    decoded = decode("kvz1", encode("kvz1", elements, "bf16", planes, range(512)), "bf16", "bf16", planes, range(512))
    assert np.array_equal(decoded[:32], elements[:32])


def test_presets_are_ordered_by_size():
    elements = reference.from_float(np.random.default_rng(3).standard_normal(1 << 14).astype(np.float32), "bf16")
    planes, tokens = [1 << 13, 1 << 13], range(1 << 9)
    sizes = [len(encode(name, elements, "bf16", planes, tokens)) for name in ("kvz1", "kvz2", "kvz3")]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < 0.45 * elements.nbytes


@presets
@given(payload=st.binary(max_size=200), start=st.integers(0, 5), head=st.integers(0, 3))
def test_arbitrary_bytes_decode_or_raise_codec_error(name, payload, start, head):
    # Few escapes, so that the parts behind them are looked at too.
    try:
        decode(name, head.to_bytes(4, "little") + payload, "bf16", "f16", [16, 16], range(start, start + 4))
    except CodecError:
        return


@presets
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=8))
def test_damaged_payloads_decode_finite_or_raise_codec_error(name, flips):
    elements, planes, tokens = frame_with_outliers("bf16")
    payload = bytearray(encode(name, elements, "bf16", planes, tokens))
    for at, mask in flips:
        payload[at % len(payload)] ^= mask
    try:
        decoded = decode(name, payload, "bf16", "f16", planes, tokens)
    except CodecError:
        return
    assert (decoded & 0x7FFF < 0x7C00).all()


def payload_of(codes, escapes, num_escapes=None):
    """One plane of one channel, mean 0 and step 1, that starts behind the first four tokens."""
    head = (len(escapes) if num_escapes is None else num_escapes).to_bytes(4, "little")
    exact = np.array(escapes, "<u2").tobytes()
    return head + np.float32(1).tobytes() + bytes(2) + exact + zstandard.compress(bytes(codes))


def test_a_payload_written_by_hand_decodes():
    decoded = decode("kvz1", payload_of([129, 0, 126], [0x4000]), "bf16", "f16", [3], range(4, 7))
    assert decoded.view(np.float16).tolist() == [1, 2, -2]


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (payload_of([129, 129, 129], [0x4000]), "escapes"),
        (payload_of([0, 0, 129], [0x4000]), "escapes"),
        (payload_of([0, 0, 0], [], num_escapes=2**32 - 1), "escapes"),
        (payload_of([129] * 4, []), "declares 4 bytes, not 3"),
        (payload_of([0, 129, 129], [0x7F80]), "infinity"),
        (b"\0" * 9, "too short"),
        (b"", "too short"),
    ],
)
def test_payloads_that_contradict_themselves_are_refused(payload, words):
    with pytest.raises(CodecError, match=words):
        decode("kvz1", payload, "bf16", "f16", [3], range(4, 7))


def test_planes_that_are_no_whole_rows_are_refused():
    for planes, tokens in (([10], range(3)), ([8], range(5, 5))):
        with pytest.raises(CodecError, match="whole rows"):
            decode("kvz1", bytes(100), "bf16", "f16", planes, tokens)


def test_a_mean_beyond_f16_is_refused():
    elements = reference.from_float(np.full(64, 1e6, np.float32), "bf16")
    with pytest.raises(CodecError, match="too large for f16"):
        encode("kvz1", elements, "bf16", [64, 0], range(8))
