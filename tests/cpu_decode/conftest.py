"""A real worker over the default model, with bf16 cells: their logits do not depend on where the cells lie."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cpu_decode.geometry import read_geometry
from cpu_decode.llama import Context, Model
from cpu_decode.worker import Worker
from tests.cpu_decode.worker_client import WorkerClient
from transfer.config import Decode, Link
from transfer.geometry import KVGeometry
from transfer.sender import KVSender

LINK = Link(chunk_tokens=64, credit_chunks=2, frame_mib=1)


@dataclass
class Running:
    """A worker that serves in a thread, and what a test may look at."""

    worker: Worker
    client: WorkerClient
    model: Model
    context: Context
    geometry: KVGeometry
    sender: KVSender


@pytest.fixture(scope="session")
def geometry(default_pair) -> KVGeometry:
    return read_geometry(Path(default_pair.gguf))


@pytest.fixture(scope="session")
def model(default_pair) -> Iterator[Model]:
    model = Model(Path(default_pair.gguf))
    yield model
    model.close()


@pytest.fixture
def context(model: Model) -> Iterator[Context]:
    """A context of its own, for calls on the test's thread."""
    context = Context(model, num_cells=2048, max_sequences=4, batch_tokens=512, threads=2, cell_type="bf16")
    yield context
    context.close()


@pytest.fixture(scope="module")
def running(model: Model, geometry: KVGeometry) -> Iterator[Running]:
    decode = Decode(
        control_port=0, kv_port=0, num_cells=4096, max_sequences=8, cell_type="bf16", threads=2, landing_mib=64
    )
    context = Context(model, num_cells=4096, max_sequences=8, batch_tokens=512, threads=2, cell_type="bf16")
    worker = Worker(model, context, geometry, decode, LINK)
    thread = threading.Thread(target=worker.run)
    thread.start()
    client = WorkerClient(worker.control_port)
    sender = KVSender(geometry, max_backlog_bytes=1 << 28, frame_bytes=1 << 20)
    yield Running(worker, client, model, context, geometry, sender)
    sender.close()
    client.close()
    worker.stop()
    thread.join(10)
    assert not thread.is_alive()
    context.close()
