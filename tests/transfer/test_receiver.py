import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from tests.transfer.kv_plane import FRAME_BYTES, GEOMETRY, TOKEN_BYTES, Worker, make_ticket
from tests.transfer.plain_frames import pack
from transfer.codecs import CODECS
from transfer.errors import CodecError, LinkError, ProtocolError
from transfer.frames import Element, Header, Kind
from transfer.layout import Slab
from transfer.messages import (
    Cancel,
    Credit,
    Failure,
    Landed,
    Resend,
    SenderHello,
    decode_from_receiver,
    encode,
)
from transfer.shares import Share
from transfer.stages import SenderReport

HELLO = SenderHello(geometry=GEOMETRY, codecs=("raw",))
TOKENS = 2
LAYER = np.full(TOKENS * TOKEN_BYTES // 2, 0x3F80, np.uint16)
PAYLOAD = np.tile(LAYER, GEOMETRY.num_layers).tobytes()
REPORT = SenderReport(
    num_tokens=TOKENS, num_frames=1, kv_raw_bytes=len(PAYLOAD), kv_wire_bytes=len(PAYLOAD), gather_ns=0, encode_ns=0
)


class Peer:
    """A hand-driven sender."""

    def __init__(self, worker, *, hello=HELLO):
        self.worker = worker
        self.session = 0
        self.control = worker.context.socket(zmq.DEALER)
        self.frames = worker.context.socket(zmq.PUSH)
        for socket in (self.control, self.frames):
            socket.linger = 0
        self.control.connect(worker.endpoint)
        self.frames.connect(f"tcp://127.0.0.1:{worker.receiver.frames_port}")
        if hello is not None:
            self.say(hello)
            welcome = self.hear()
            assert (welcome.max_frame_bytes, welcome.frames_port) == (FRAME_BYTES, worker.receiver.frames_port)
            self.session = welcome.session

    def say(self, message):
        self.control.send(encode(message))

    def send(self, *parts):
        self.frames.send_multipart(parts)

    def frame(self, ticket, payload=PAYLOAD, **fields):
        fields = {"kind": Kind.DATA, "sequence": 0, "session": self.session, **fields}
        if fields["kind"] == Kind.DATA:
            whole = {"codec": 1, "element": Element.BF16, "num_tokens": TOKENS, "num_layers": GEOMETRY.num_layers}
            fields = {**whole, **fields}
        self.send(pack(Header(ticket=bytes.fromhex(ticket.ticket), **fields), payload), payload)

    def end(self, ticket, sequence=1, payload=None):
        payload = msgspec.msgpack.encode(REPORT) if payload is None else payload
        self.frame(ticket, payload, kind=Kind.END, sequence=sequence, num_tokens=TOKENS)

    def hear(self):
        assert self.worker.run_until(lambda: self.control.poll(0))
        return decode_from_receiver(self.control.recv())

    def settle(self):
        """What the worker said until it had taken every frame sent so far: it answers a last one in order."""
        marker = make_ticket(self.worker.endpoint)
        self.frame(marker)
        answers = [self.hear()]
        while getattr(answers[-1], "ticket", "") != marker.ticket:
            answers.append(self.hear())
        return answers[:-1]

    def close(self):
        self.control.close()
        self.frames.close()


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture
def connect(worker):
    """Makes peers of the worker."""
    peers = []

    def connect(**options):
        peers.append(Peer(worker, **options))
        return peers[-1]

    yield connect
    for peer in peers:
        peer.close()


@pytest.fixture
def peer(connect):
    return connect()


@pytest.fixture
def ticket(worker):
    return make_ticket(worker.endpoint)


@pytest.fixture
def landed(worker, ticket):
    return worker.expect(ticket)


def test_a_whole_transfer_lands(worker, peer, ticket, landed):
    peer.frame(ticket)
    peer.end(ticket)
    assert worker.run_until(lambda: landed.over)
    assert landed.report == REPORT
    assert np.array_equal(landed.chunk(0), np.tile(LAYER, (GEOMETRY.num_layers, 1)))
    assert worker.receiver.open_tickets == 0
    assert peer.settle() == [
        Credit(ticket=ticket.ticket, chunks=3, next_sequence=1),
        Landed(ticket=ticket.ticket),
    ]


@pytest.mark.parametrize(
    ("hello", "code", "words"),
    [
        (msgspec.structs.replace(HELLO, protocol=1), "protocol_error", "2 here, 1 there"),
        (
            msgspec.structs.replace(HELLO, geometry=msgspec.structs.replace(GEOMETRY, head_dim_k=64)),
            "geometry_mismatch",
            "head_dim_k: 32 here, 64 there",
        ),
        (msgspec.structs.replace(HELLO, codecs=("snappy",)), "codec_error", "snappy there"),
    ],
)
def test_a_sender_that_does_not_fit_is_refused_with_the_reason(connect, ticket, landed, hello, code, words):
    peer = connect(hello=None)
    peer.say(hello)
    answer = peer.hear()
    assert isinstance(answer, Failure)
    assert answer.code == code
    assert words in answer.message
    peer.frame(ticket)
    connect().settle()
    assert not landed.rows


def test_frames_of_no_session_are_dropped(worker, connect, ticket, landed):
    peer = connect(hello=None)
    for session in (0, 77):
        peer.frame(ticket, session=session)
    assert worker.run_until(lambda: worker.receiver.dropped_frames == 2)
    assert not landed.over
    assert not landed.rows


def test_a_sender_that_says_hello_again_keeps_its_session_unless_it_asks_for_another(peer):
    peer.say(HELLO)
    assert peer.hear().session == peer.session
    peer.say(msgspec.structs.replace(HELLO, renew=True))
    renewed = peer.hear().session
    assert renewed != peer.session
    peer.say(HELLO)
    assert peer.hear().session == renewed


def test_frames_for_a_ticket_that_is_not_open_are_cancelled(peer, ticket):
    peer.frame(ticket)
    answer = peer.hear()
    assert isinstance(answer, Cancel)
    assert answer.ticket == ticket.ticket


def test_a_repeated_frame_lands_once(worker, peer, ticket, landed):
    peer.frame(ticket)
    peer.frame(ticket)
    peer.end(ticket)
    assert worker.run_until(lambda: landed.over)
    assert landed.report == REPORT


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"codec": 2}, CodecError, "lz4"),
        ({"codec": 77}, CodecError, "77"),
        ({"num_tokens": TOKENS + 1}, CodecError, "bytes"),
        ({"num_layers": 4}, ProtocolError, "out of its chunk"),
        ({"kind": Kind.END, "payload": b"\xc1"}, ProtocolError, "END frame does not parse"),
        ({"kind": Kind.END, "payload": b"\x81\xa1x" + 1000 * b"\x91" + b"\x01"}, ProtocolError, "END frame"),
        ({"kind": Kind.END, "payload": b"\x81\xaanum_tokens\xa2\xff\xfe"}, ProtocolError, "END frame"),
        ({"kind": Kind.END, "payload": msgspec.msgpack.encode(REPORT)}, ProtocolError, "do not cover"),
        ({"kind": Kind.ABORT, "payload": b"out of \xff blocks"}, LinkError, "out of"),
    ],
)
def test_a_frame_that_breaks_its_transfer_ends_it_on_both_sides(worker, peer, ticket, landed, fields, kind, words):
    peer.frame(ticket, **fields)
    assert worker.run_until(lambda: landed.over)
    assert type(landed.error) is kind
    assert words in str(landed.error)
    assert worker.receiver.open_tickets == 0
    (answer,) = peer.settle()
    assert isinstance(answer, Cancel)
    assert answer.ticket == ticket.ticket


def test_a_damaged_frame_is_dropped_and_asked_for_again(worker, peer, ticket, landed):
    damaged = bytearray(PAYLOAD)
    damaged[100] ^= 1
    fields = {"sequence": 0, "codec": 1, "element": Element.BF16, "session": peer.session}
    peer.send(pack(Header(kind=Kind.DATA, ticket=bytes.fromhex(ticket.ticket), **fields), PAYLOAD), bytes(damaged))
    peer.end(ticket)
    assert peer.settle() == [Resend(ticket=ticket.ticket, sequence=0)]
    assert not landed.over
    peer.frame(ticket)
    peer.end(ticket)
    assert worker.run_until(lambda: landed.over)
    assert landed.report == REPORT


def test_a_gap_is_asked_for_once_and_again_by_a_probe(peer, ticket, landed):
    for sequence in (2, 3, 4):
        peer.frame(ticket, sequence=sequence)
    assert peer.settle() == [Resend(ticket=ticket.ticket, sequence=0)]
    peer.frame(ticket, b"", kind=Kind.PROBE, sequence=5)
    assert peer.settle() == [Resend(ticket=ticket.ticket, sequence=0)]
    peer.frame(ticket, b"", kind=Kind.PROBE, sequence=0)
    assert peer.settle() == [Credit(ticket=ticket.ticket, chunks=2, next_sequence=0)]
    assert not landed.rows


def test_a_probe_after_the_end_hears_that_all_has_landed(worker, peer, ticket, landed):
    peer.frame(ticket)
    peer.end(ticket)
    assert worker.run_until(lambda: landed.over)
    peer.settle()
    peer.frame(ticket, b"", kind=Kind.PROBE, sequence=2)
    assert peer.settle() == [Landed(ticket=ticket.ticket)]


def test_a_second_sender_can_neither_feed_nor_end_a_transfer(worker, connect, ticket, landed):
    first, second = connect(), connect()
    first.frame(ticket)
    assert worker.run_until(lambda: landed.rows)
    second.frame(ticket, kind=Kind.ABORT, payload=b"mine", sequence=1)
    second.end(ticket)
    second.settle()
    assert not landed.over
    first.end(ticket)
    assert worker.run_until(lambda: landed.over)
    assert landed.report == REPORT


def test_a_sender_of_a_share_is_welcomed_as_one(connect):
    half = Share(first_kv_head=0, num_kv_heads=1, first_layer=0, num_layers=3)
    peer = connect(hello=None)
    peer.say(msgspec.structs.replace(HELLO, share=half))
    assert peer.hear().share == half
    peer.say(msgspec.structs.replace(HELLO, share=msgspec.structs.replace(half, first_kv_head=2)))
    refusal = peer.hear()
    assert isinstance(refusal, Failure)
    assert "share.kv_heads" in refusal.message


def test_a_cancelled_ticket_hears_nothing_more(worker, peer, ticket, landed):
    peer.frame(ticket)
    assert worker.run_until(lambda: landed.rows)
    worker.receiver.cancel(ticket.ticket, "evicted")
    peer.end(ticket)
    assert Cancel(ticket=ticket.ticket, reason="evicted") in peer.settle()
    assert not landed.over


def test_a_message_over_the_limit_costs_its_sender_the_connection_only(worker, connect, ticket, landed):
    greedy, peer = connect(), connect()
    greedy.send(bytes(64), bytes(4 * FRAME_BYTES))
    peer.frame(ticket)
    peer.end(ticket)
    assert worker.run_until(lambda: landed.over)
    assert landed.report == REPORT


def test_a_sender_that_left_is_not_waited_for(worker, connect, ticket, landed):
    peer = connect()
    peer.frame(ticket)
    assert worker.run_until(lambda: landed.rows)
    peer.close()
    worker.receiver.grant(ticket.ticket, 9)
    worker.receiver.cancel(ticket.ticket, "deadline")
    assert worker.receiver.open_tickets == 0


@pytest.fixture(scope="module")
def lasting():
    """A worker and a peer for many examples."""
    worker = Worker()
    peer = Peer(worker)
    yield worker, peer
    peer.close()
    worker.close()


@given(parts=st.lists(st.binary(max_size=100), min_size=1, max_size=4))
def test_arbitrary_messages_leave_the_receiver_working(lasting, parts):
    _, peer = lasting
    peer.send(*parts)
    peer.control.send_multipart(parts)
    peer.settle()
    while peer.control.poll(0):
        peer.control.recv()


@given(
    fields=st.fixed_dictionaries(
        {
            "kind": st.sampled_from(Kind),
            "sequence": st.integers(0, 3),
            "codec": st.integers(0, 6),
            "element": st.sampled_from(Element),
            "start_token": st.integers(0, 2**32 - 1),
            "num_tokens": st.integers(0, 3) | st.integers(0, 2**32 - 1),
            "first_layer": st.integers(0, 4) | st.integers(0, 2**16 - 1),
            "num_layers": st.integers(0, 4) | st.integers(0, 2**16 - 1),
        }
    ),
    payload=st.binary(max_size=100)
    | st.just(PAYLOAD)
    | st.just(bytes(CODECS["q8"].encode(LAYER, Element.BF16, Slab(GEOMETRY, 1, range(TOKENS))))),
)
def test_well_formed_nonsense_ends_its_transfer_or_is_ignored(lasting, fields, payload):
    worker, peer = lasting
    ticket = make_ticket(worker.endpoint)
    landed = worker.expect(ticket)
    peer.frame(ticket, payload, **fields)
    peer.settle()
    assert landed.over == (worker.receiver.open_tickets == 0)
    worker.receiver.cancel(ticket.ticket, "next")
