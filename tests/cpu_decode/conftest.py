"""A real worker over the default model, with bf16 cells: their logits do not depend on where the cells lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cpu_decode import clients
from cpu_decode.geometry import read_geometry
from cpu_decode.llama import Context, Model
from tests.cpu_decode.serving import Running, serving
from transfer.geometry import KVGeometry


@pytest.fixture(scope="session", autouse=True)
def patience() -> Iterator[None]:
    """A busy host may keep a test from pinging its worker for longer than a proxy ever is silent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clients, "CLIENT_SILENCE_S", 120.0)
        yield


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
    context = Context(model, num_cells=2048, max_sequences=4, batch_tokens=512, threads=1, cell_type="bf16")
    yield context
    context.close()


@pytest.fixture(scope="module")
def running(model: Model, geometry: KVGeometry) -> Iterator[Running]:
    with serving(model, geometry, "bf16") as running:
        yield running
