"""More workers than the one that the cluster file pins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from tests.proxy.conftest import Stack, free_port, wait_until
from tests.proxy.fake_worker import FakeWorker
from transfer.messages import Announce, encode


@contextmanager
def announced(stack: Stack) -> Iterator[FakeWorker]:
    """A second worker, of which ``stack`` hears once, and which is up."""
    port = free_port()
    worker = FakeWorker(f"tcp://127.0.0.1:{port}", name=f"127.0.0.1:{port}")
    try:
        announce(stack, Announce(worker=worker.name, control_endpoint=f"tcp://127.0.0.1:{port}"))
        wait_until(lambda: worker.name in stack.gateway.workers.nodes)
        node = stack.gateway.workers.nodes[worker.name]
        wait_until(lambda: node.status)
        yield worker
        wait_until(lambda: not worker.open)
    finally:
        worker.close()


def announce(stack: Stack, said: Announce | bytes) -> None:
    """Say it to the proxy's registry."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.connect(f"tcp://127.0.0.1:{stack.gateway.cluster.proxy.registry_port}")
        dealer.send(said if isinstance(said, bytes) else encode(said))
        dealer.linger = 2000
