"""The way to a worker that does not let this sender in, at first."""

import time

import pytest
import zmq

from tests.transfer.kv_plane import FRAME_BYTES, GEOMETRY, PATIENCE_S
from transfer import doorkeeper, keys, link
from transfer.doorkeeper import Doorkeeper
from transfer.receiver import KVReceiver


@pytest.fixture
def impatience(monkeypatch):
    monkeypatch.setattr(doorkeeper, "READ_EVERY_S", 0.0)
    monkeypatch.setattr(link, "HELLO_AGAIN_S", 0.1)
    monkeypatch.setattr(link, "CONNECT_AGAIN_S", 0.3)


@pytest.mark.usefixtures("impatience")
def test_a_link_opens_when_its_key_is_admitted_later(tmp_path):
    keys.make(tmp_path)
    own = keys.client(tmp_path, "prefill")
    (tmp_path / "prefill.key").rename(tmp_path / "put-away")
    keys.make(tmp_path, ("prefill-other",))
    with zmq.Context() as context:
        server = keys.server(tmp_path)
        door = Doorkeeper(context, server)
        receiver = KVReceiver(context, "127.0.0.1", GEOMETRY, frame_bytes=FRAME_BYTES, seal="integrity", keys=server)
        way = link.Link(context, f"tcp://127.0.0.1:{receiver.port}", GEOMETRY, None, own)

        def opens_within(patience_s):
            give_up_ns = time.monotonic_ns() + int(patience_s * 1e9)
            while not way.open and time.monotonic_ns() < give_up_ns:
                way.hello()
                receiver.turn()
                assert not list(way.words())
                time.sleep(0.01)
            return way.open

        try:
            assert not opens_within(1.0)
            assert door.refused > 1
            (tmp_path / "put-away").rename(tmp_path / "prefill.key")
            assert opens_within(PATIENCE_S)
        finally:
            way.close()
            receiver.close()
            door.close()
