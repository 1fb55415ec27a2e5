import pytest
import zmq

from tests.transfer.kv_plane import GEOMETRY
from transfer.errors import ConfigError
from transfer.listen import bind
from transfer.receiver import KVReceiver


@pytest.fixture
def context():
    with zmq.Context() as context:
        yield context


def test_a_taken_port_is_an_error_that_names_its_key(context):
    with context.socket(zmq.PULL) as first, context.socket(zmq.PULL) as second:
        bind(first, "127.0.0.1", 0, "[decode] kv_port")
        port = int(first.last_endpoint.rsplit(b":", 1)[1])
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port} .*change \[decode\] kv_port"):
            bind(second, "127.0.0.1", port, "[decode] kv_port")
        assert second.closed


def test_a_host_that_is_not_this_one_is_the_same_error(context):
    with context.socket(zmq.PULL) as socket, pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        bind(socket, "192.0.2.1", 0, "[decode] kv_port")


@pytest.mark.parametrize("taken", ["control_port", "frames_port"])
def test_a_receiver_that_cannot_listen_leaves_no_socket(context, taken):
    with context.socket(zmq.PULL) as first:
        bind(first, "127.0.0.1", 0, "")
        port = int(first.last_endpoint.rsplit(b":", 1)[1])
        with pytest.raises(ConfigError, match=str(port)):
            KVReceiver(context, "127.0.0.1", GEOMETRY, frame_bytes=1 << 20, **{taken: port})
    context.term()  # would wait for a socket that is open
