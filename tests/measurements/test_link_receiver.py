"""The serving process: it refuses what it does not understand or will not do, and goes on."""

import time

import msgspec
import pytest

from measurements import link_receiver, link_sender
from measurements.link_orders import (
    MAX_ORDER_BYTES,
    Await,
    Done,
    Expecting,
    Greet,
    Greeted,
    Receive,
    ReceiveBare,
    Refused,
    decode_answer,
    encode,
)
from measurements.link_sender import Peer
from measurements.link_synthetic import TOKEN_BYTES, chunks
from tests.measurements.link_agent import ordering, serving
from transfer.config import Link
from transfer.errors import ConfigError, EngineError, LinkError, ProtocolError

RECEIVE = Receive(codec="raw", seal="none", num_tokens=40, chunk_tokens=16, credit_chunks=2)
LINK = Link(chunk_tokens=16)


def changed(**fields):
    return encode(msgspec.structs.replace(RECEIVE, **fields))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((b"",), "does not parse"),
        ((b"\xff" * 100,), "does not parse"),
        ((b"\x91" * 50_000,), "does not parse"),
        ((msgspec.msgpack.encode({"type": "Destroy"}),), "Destroy"),
        ((msgspec.msgpack.encode({"type": "Greet", "extra": 1}),), "extra"),
        ((encode(Greet()), b"more"), "one part"),
        ((encode(Greet(version=99)),), "99"),
        ((changed(codec="none such"),), "none such"),
        ((changed(codec="rows_q8_0"),), "rows_q8_0"),
        ((changed(seal="rot13"),), "rot13"),
        ((changed(num_tokens=0),), "num_tokens"),
        ((changed(num_tokens=1 << 40),), "num_tokens"),
        ((changed(chunk_tokens=1 << 20),), "chunk_tokens"),
        ((changed(chunk_tokens=1024, credit_chunks=1000),), "limit of 8192"),
        ((encode(ReceiveBare(messages=1 << 40)),), "messages"),
        ((encode(Await()),), "nothing to wait for"),
    ],
)
def test_bad_orders_are_refused_and_the_next_one_is_answered(tmp_path, parts, reason):
    with serving(tmp_path) as (agent, endpoint), ordering(endpoint) as ask:
        answer = ask(*parts)
        assert isinstance(answer, Refused)
        assert reason in answer.reason
        assert isinstance(ask(encode(Greet())), Greeted)
        assert agent._task is None


def test_an_order_over_the_limit_is_not_even_read(tmp_path):
    with serving(tmp_path) as (_, endpoint):
        with ordering(endpoint, 300) as ask, pytest.raises(AssertionError, match="no answer"):
            ask(bytes(MAX_ORDER_BYTES + 1))
        with ordering(endpoint) as ask:
            assert isinstance(ask(encode(Greet())), Greeted)


@pytest.mark.parametrize("seal", ["none", "integrity", "aes-gcm"])
@pytest.mark.parametrize("codec", ["raw", "q8"])
def test_a_transfer_lands_and_says_what_it_cost(tmp_path, codec, seal):
    with serving(tmp_path) as (agent, endpoint):
        peer = Peer(endpoint)
        try:
            sample = link_sender.plane(peer, codec, seal, chunks(40, 16), LINK)
        finally:
            peer.close()
        assert sample["kv_bytes"] == 40 * TOKEN_BYTES
        assert 0.5 < sample["wire_bytes"] / sample["kv_bytes"] < 1.01
        assert sample["decode_frame_s"] > 0
        # What landed is free again, and never took more than the credits.
        assert agent._pool[1].in_use == 0
        assert TOKEN_BYTES * 16 < sample["landing_bytes"] <= 2 * agent._pool[1].buffer_bytes


def test_sealing_alone_is_timed_too(tmp_path):
    with serving(tmp_path) as (_, endpoint):
        peer = Peer(endpoint)
        try:
            sample = link_sender.sealed_plane(peer, "aes-gcm", chunks(40, 16), LINK)
        finally:
            peer.close()
    assert sample["way"] == "raw aes-gcm"
    assert min(sample["seal_s"], sample["open_s"]) > 0


def test_bare_messages_are_counted(tmp_path):
    with serving(tmp_path) as (_, endpoint):
        peer = Peer(endpoint)
        try:
            for copied in (False, True):
                assert link_sender.bare(peer, chunks(40, 16), LINK, copied=copied)["kv_bytes"] == 40 * TOKEN_BYTES
        finally:
            peer.close()


def test_a_new_order_abandons_the_one_before(tmp_path):
    with serving(tmp_path) as (agent, endpoint), ordering(endpoint) as ask:
        first, second = ask(changed()), ask(changed())
        assert isinstance(first, Expecting)
        assert isinstance(second, Expecting)
        assert agent._receivers["none"].open_tickets == 1


def test_what_never_comes_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(link_receiver, "PATIENCE_S", 0.1)
    monkeypatch.setattr(link_receiver, "POLL_MS", 20)
    with serving(tmp_path) as (agent, endpoint), ordering(endpoint) as ask:
        ask(changed())
        answer = ask(encode(Await()))
        assert isinstance(answer, Refused)
        assert "did not come" in answer.reason
        assert agent._receivers["none"].open_tickets == 0


def test_a_transfer_that_fails_is_told_to_the_sender(tmp_path):
    def too_few(sender, ticket):
        for tokens, elements in chunks(16, 16):
            link_sender.submit(sender, ticket, tokens, 0, elements)
        return time.monotonic_ns()

    with serving(tmp_path) as (agent, endpoint):
        peer = Peer(endpoint)
        try:
            with pytest.raises(EngineError, match="transfer ended with 16 of 40 tokens"):
                link_sender.transfer(peer, "raw", "none", 40, 16, 2, too_few)
        finally:
            peer.close()
        assert agent._pool[1].in_use == 0


def test_a_silent_run_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(link_receiver, "IDLE_S", 0.1)
    monkeypatch.setattr(link_receiver, "POLL_MS", 20)
    with serving(tmp_path):
        pass


def test_an_address_of_another_host_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--serve"):
        link_receiver.ReceivingAgent("203.0.113.7", 7311, tmp_path)


def test_nobody_there_is_said(monkeypatch):
    monkeypatch.setattr(link_sender, "GREET_PATIENCE_S", 0.1)
    with pytest.raises(LinkError, match="Greet"):
        Peer("tcp://127.0.0.1:9")


def test_answers_are_checked_too():
    with pytest.raises(ProtocolError, match="does not parse"):
        decode_answer(b"\xff\xff")
    assert isinstance(decode_answer(encode(Done(cpu_ns=1))), Done)
