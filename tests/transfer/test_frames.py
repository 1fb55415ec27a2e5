import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from tests.golden import examples, freeze
from tests.transfer import codec_reference as reference
from tests.transfer.plain_frames import pack, parse
from transfer.codecs import CODECS, by_wire_id
from transfer.errors import CodecError, ProtocolError
from transfer.frames import HEADER_BYTES, MAX_CONTROL_PAYLOAD_BYTES, Element, Header, Kind
from transfer.layout import plane_elements
from transfer.seal import Seal

GOLDEN = freeze.read(freeze.FRAMES)
LIMIT = 1 << 20
PAYLOAD = bytes(range(100))
DATA = Header(
    kind=Kind.DATA,
    ticket=bytes(range(16)),
    sequence=7,
    codec=1,
    element=Element.BF16,
    start_token=512,
    num_tokens=100,
    first_layer=4,
    num_layers=2,
    seal=Seal.INTEGRITY,
    session=0x0203,
)

u16, u32 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)
data_headers = st.builds(
    Header,
    kind=st.just(Kind.DATA),
    seal=st.sampled_from(Seal),
    session=u16,
    ticket=st.binary(min_size=16, max_size=16),
    sequence=u32,
    codec=st.integers(1, 255),
    element=st.sampled_from([Element.BF16, Element.F16]),
    start_token=u32,
    num_tokens=u32,
    first_layer=u16,
    num_layers=u16,
)
closing_headers = st.builds(
    Header,
    kind=st.sampled_from([Kind.END, Kind.ABORT, Kind.PROBE]),
    seal=st.sampled_from(Seal),
    session=u16,
    ticket=st.binary(min_size=16, max_size=16),
    sequence=u32,
    num_tokens=u32,
)


def with_checksum(body):
    return bytes(body) + xxhash.xxh3_64_intdigest(bytes(body)).to_bytes(8, "little")


def changed(offset, value, size=1):
    """DATA's header with one field overwritten and the header's checksum made right again."""
    body = bytearray(pack(DATA, PAYLOAD)[:56])
    body[offset : offset + size] = value.to_bytes(size, "little")
    return with_checksum(body)


@given(header=data_headers | closing_headers, payload=st.binary(max_size=MAX_CONTROL_PAYLOAD_BYTES))
def test_what_is_packed_is_parsed(header, payload):
    head = pack(header, payload)
    assert len(head) == HEADER_BYTES == 64
    assert parse(head, payload, LIMIT) == header
    assert parse(memoryview(head), memoryview(payload), LIMIT) == header


def test_fields_lie_where_the_table_says():
    head = pack(DATA, PAYLOAD)

    def field(offset, size):
        return int.from_bytes(head[offset : offset + size], "little")

    assert head[:4] == b"ISTH"
    assert field(4, 2) == 1
    assert (head[6], head[7], head[8], head[9], field(10, 2)) == (1, 1, 1, 1, 0x0203)
    assert head[12:28] == bytes(range(16))
    assert (field(28, 4), field(32, 4), field(36, 4)) == (7, 512, 100)
    assert (field(40, 2), field(42, 2), field(44, 4)) == (4, 2, 100)
    assert field(48, 8) == xxhash.xxh3_64_intdigest(PAYLOAD)
    assert field(56, 8) == xxhash.xxh3_64_intdigest(head[:56])


def test_every_single_bit_flip_of_the_header_is_refused():
    head = pack(DATA, PAYLOAD)
    for bit in range(8 * HEADER_BYTES):
        flipped = bytearray(head)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError):
            parse(bytes(flipped), PAYLOAD, LIMIT)


def test_every_single_bit_flip_of_the_payload_is_refused():
    head = pack(DATA, PAYLOAD)
    for bit in range(8 * len(PAYLOAD)):
        flipped = bytearray(PAYLOAD)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError, match="checksum"):
            parse(head, bytes(flipped), LIMIT)


@pytest.mark.parametrize("length", [0, 1, 63, 65, 128])
def test_headers_of_another_length_are_refused(length):
    head = (pack(DATA, PAYLOAD) * 2)[:length]
    with pytest.raises(ProtocolError, match=f"{length} bytes"):
        parse(head, PAYLOAD, LIMIT)


@pytest.mark.parametrize("payload", [b"", PAYLOAD[:-1], PAYLOAD + b"\0"])
def test_payloads_of_another_length_are_refused(payload):
    with pytest.raises(ProtocolError, match="header says 100"):
        parse(pack(DATA, PAYLOAD), payload, LIMIT)


def test_a_payload_over_the_limit_is_refused_by_its_header():
    head = pack(DATA, PAYLOAD)
    assert parse(head, PAYLOAD, 100) == DATA
    with pytest.raises(ProtocolError, match="over the limit of 99"):
        parse(head, PAYLOAD, 99)
    with pytest.raises(ProtocolError, match="4294967295 bytes is over"):
        parse(changed(44, 2**32 - 1, 4), PAYLOAD, LIMIT)


@pytest.mark.parametrize("kind", [Kind.END, Kind.ABORT, Kind.PROBE])
def test_closing_frames_have_their_own_limit(kind):
    header = Header(kind=kind, ticket=bytes(16), sequence=0)
    payload = bytes(MAX_CONTROL_PAYLOAD_BYTES)
    assert parse(pack(header, payload), payload, LIMIT) == header
    with pytest.raises(ProtocolError, match="over the limit of 1024"):
        parse(pack(header, payload + b"\0"), payload + b"\0", LIMIT)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (changed(0, 0), "starts with"),
        (changed(4, 0, 2), "version is 0, this node speaks 1"),
        (changed(4, 2, 2), "version is 2, this node speaks 1"),
        (changed(6, 0), "kind 0"),
        (changed(6, 5), "kind 5"),
        (changed(9, 3), "seal 3"),
        (changed(8, 3), "element type 3"),
        (changed(8, 0), "does not go with"),
        (changed(7, 0), "does not go with"),
        (changed(6, Kind.END), "does not go with"),
    ],
)
def test_unknown_and_inconsistent_fields_are_named(head, words):
    with pytest.raises(ProtocolError, match=words):
        parse(head, PAYLOAD, LIMIT)


@given(head=st.binary(max_size=2 * HEADER_BYTES), payload=st.binary(max_size=64))
def test_arbitrary_bytes_are_refused(head, payload):
    with pytest.raises(ProtocolError):
        parse(head, payload, LIMIT)


@given(body=st.binary(min_size=50, max_size=50), payload=st.binary(max_size=64))
def test_arbitrary_fields_under_a_right_checksum_parse_or_raise_protocol_error(body, payload):
    head = with_checksum(b"ISTH\x01\x00" + body)
    try:
        header = parse(head, payload, LIMIT)
    except ProtocolError:
        return
    assert pack(header, payload)[12:] == head[12:]


def test_every_example_is_frozen():
    assert GOLDEN.keys() == examples.frames().keys()


@pytest.mark.parametrize("name", examples.frames())
def test_frozen_frames_are_understood_and_made_again(name):
    head, payload = GOLDEN[name]
    header, _ = examples.frames()[name]
    assert parse(head, payload, LIMIT) == header
    assert pack(header, payload) == head


@pytest.mark.parametrize("name", [name for name in GOLDEN if "-" in name and "rows" not in name])
@pytest.mark.parametrize("cells", [Element.BF16, Element.F16])
def test_frozen_payloads_decode_to_the_same_elements(name, cells):
    head, payload = GOLDEN[name]
    header = parse(head, payload, LIMIT)
    codec = by_wire_id(header.codec)
    out = np.empty(examples.ELEMENTS.size, np.uint16)
    planes = plane_elements(examples.GEOMETRY, header.num_tokens) * header.num_layers
    tokens = range(header.start_token, header.start_token + header.num_tokens)
    codec.decode(payload, header.element, cells, np.split(out, np.cumsum(planes)[:-1]), tokens)
    kinds = header.element.name.lower(), cells.name.lower()
    if codec.name.startswith("kvz"):
        expected = reference.decode_kvz(payload, *kinds, planes, tokens)
    else:
        expected = reference.DECODE[codec.name](payload, *kinds)
    assert np.array_equal(out, expected)
    if codec.name in ("raw", "lz4", "zstd") and header.element == cells:
        assert np.array_equal(out, examples.ELEMENTS)


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith(("raw", "q8", "k8v4", "rows"))])
def test_frozen_payloads_are_made_again(name):
    # The libraries of lz4 and zstd may find another encoding of the same plane.
    _, payload = GOLDEN[name]
    assert examples.frames()[name][1] == payload


@given(header=data_headers, payload=st.binary(max_size=200))
def test_a_parsed_frame_with_a_senseless_payload_ends_in_codec_error(header, payload):
    parsed = parse(pack(header, payload), payload, LIMIT)
    outs = [np.empty(64, np.uint16), np.empty(32, np.uint16)]
    try:
        by_wire_id(parsed.codec).decode(payload, parsed.element, Element.F16, outs, range(8))
    except CodecError:
        return
    assert parsed.codec in {codec.wire_id for codec in CODECS.values()}
