"""A serving process's work on a thread of the test, so that a test can look into it."""

import threading
from contextlib import contextmanager

import zmq

from isthmus.ports import free_ports
from measurements.link_orders import Leave, decode_answer, encode
from measurements.link_receiver import ReceivingAgent


@contextmanager
def serving(folder):
    """(agent, endpoint); the agent has ended afterwards."""
    (port,) = free_ports(1)
    agent = ReceivingAgent("127.0.0.1", port, folder)
    thread = threading.Thread(target=agent.run)
    thread.start()
    endpoint = f"tcp://127.0.0.1:{port}"
    try:
        yield agent, endpoint
    finally:
        # Once it has been told to leave, nobody answers, though its thread may not have ended yet.
        if thread.is_alive() and not agent._left:
            with ordering(endpoint) as ask:
                ask(encode(Leave()))
        thread.join(20)
        assert not thread.is_alive()
        agent.close()


@contextmanager
def ordering(endpoint, patience_ms=10_000):
    """A function that sends raw bytes as an order and returns the answer."""
    context = zmq.Context()
    socket = context.socket(zmq.REQ)
    socket.linger = 0
    socket.connect(endpoint)

    def ask(*parts):
        socket.send_multipart(parts)
        assert socket.poll(patience_ms), "no answer"
        return decode_answer(socket.recv())

    try:
        yield ask
    finally:
        socket.close()
        context.term()
