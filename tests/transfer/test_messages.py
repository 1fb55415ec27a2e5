import contextlib

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.golden import examples, freeze
from transfer import messages
from transfer.errors import ProtocolError

GOLDEN = freeze.read(freeze.MESSAGES)
DECODERS = {
    messages.decode_to_worker: messages.ToWorker,
    messages.decode_from_worker: messages.FromWorker,
    messages.decode_to_registry: messages.ToRegistry,
    messages.decode_to_receiver: messages.ToReceiver,
    messages.decode_from_receiver: messages.FromReceiver,
}
every_decoder = pytest.mark.parametrize("decode", DECODERS)
every_message = pytest.mark.parametrize("message", examples.MESSAGES, ids=lambda message: type(message).__name__)


def takes(decode, message):
    return isinstance(message, DECODERS[decode])


@every_message
@every_decoder
def test_messages_go_one_way_only(decode, message):
    data = messages.encode(message)
    if takes(decode, message):
        assert decode(data) == message
        assert decode(memoryview(data)) == message
    else:
        with pytest.raises(ProtocolError, match="does not parse"):
            decode(data)


@every_message
def test_some_decoder_takes_each_message(message):
    assert any(takes(decode, message) for decode in DECODERS)


def test_every_message_has_a_frozen_example():
    names = {kind.__name__ for kind in messages.Message.__subclasses__()}
    assert {type(message).__name__ for message in examples.MESSAGES} == names == GOLDEN.keys()


@every_message
def test_frozen_messages_are_understood_and_made_again(message):
    generations = GOLDEN[type(message).__name__]
    decode = next(decode for decode in DECODERS if takes(decode, message))
    assert all(decode(frozen) == message for frozen in generations)
    assert messages.encode(message) == generations[-1]


@every_message
def test_fields_of_a_newer_peer_are_ignored(message):
    newer = msgspec.msgpack.decode(messages.encode(message)) | {"added_later": [1, {"a": None}]}
    decode = next(decode for decode in DECODERS if takes(decode, message))
    assert decode(msgspec.msgpack.encode(newer)) == message


@every_message
def test_a_missing_or_mistyped_field_is_refused_by_name(message):
    decode = next(decode for decode in DECODERS if takes(decode, message))
    fields = msgspec.msgpack.decode(messages.encode(message))
    for field in msgspec.structs.fields(message):
        with pytest.raises(ProtocolError, match=field.encode_name):
            decode(msgspec.msgpack.encode(fields | {field.encode_name: {"not": "this"}}))
        if field.required:
            rest = {name: value for name, value in fields.items() if name != field.encode_name}
            with pytest.raises(ProtocolError, match=field.encode_name):
                decode(msgspec.msgpack.encode(rest))


@every_decoder
def test_an_unknown_tag_is_refused_by_name(decode):
    with pytest.raises(ProtocolError, match="Teleport"):
        decode(msgspec.msgpack.encode({"type": "Teleport"}))


@every_decoder
@example(data=b"")
@example(data=b"\x82\xa4type\xa4Ping\xa1x" + 5000 * b"\x91" + b"\x01")
@example(data=b"\x82\xa4type\xa5Abort\xaarequest_id\xa2\xff\xfe")
@example(data=b"\x82\xa4type\xa4Ping\xa1x\xdd\xff\xff\xff\xff")
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_parse_or_raise_protocol_error(decode, data):
    with contextlib.suppress(ProtocolError):
        assert takes(decode, decode(data))


@every_message
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=4))
def test_damaged_messages_parse_or_raise_protocol_error(message, flips):
    data = bytearray(messages.encode(message))
    for at, mask in flips:
        data[at % len(data)] ^= mask
    for decode in DECODERS:
        with contextlib.suppress(ProtocolError):
            assert takes(decode, decode(bytes(data)))


def test_oversized_messages_are_refused_unread():
    with pytest.raises(ProtocolError, match="over the limit of 8388608"):
        messages.decode_to_worker(bytes(messages.MAX_MESSAGE_BYTES + 1))


def test_another_protocol_version_is_refused_with_both_numbers():
    messages.require_protocol(2)
    with pytest.raises(ProtocolError, match="2 here, 1 there"):
        messages.require_protocol(1)
