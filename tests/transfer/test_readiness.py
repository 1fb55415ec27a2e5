"""A socket's own word on whether it can be read or written, against what reading and writing do."""

import zmq

from transfer.readiness import is_ready


def test_a_socket_says_when_it_can_be_read_and_when_it_is_full():
    context = zmq.Context()
    taking, giving = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    taking.rcvhwm = giving.sndhwm = 1
    try:
        taking.bind("inproc://readiness")
        assert not is_ready(giving, zmq.POLLOUT)
        giving.connect("inproc://readiness")
        assert is_ready(giving, zmq.POLLOUT)
        assert not is_ready(taking, zmq.POLLIN)
        sent = 0
        while is_ready(giving, zmq.POLLOUT):
            giving.send(b"x", zmq.NOBLOCK)
            sent += 1
        assert sent == 2
        for _ in range(sent):
            assert is_ready(taking, zmq.POLLIN)
            taking.recv(zmq.NOBLOCK)
        assert not is_ready(taking, zmq.POLLIN)
    finally:
        taking.close(linger=0)
        giving.close(linger=0)
        context.term()
