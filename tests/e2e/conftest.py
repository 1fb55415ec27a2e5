"""The whole stack with the real engines, once for the session; bf16 cells, so that answers can be compared exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import pytest

from isthmus.up import Stack, cluster_on_free_ports, with_keys
from tests.conftest import ModelPair
from transfer.config import Cluster, Pair

# A prompt of the shipped text crosses two of these steps.
STEP_TOKENS = 512


@dataclass(frozen=True)
class Running:
    """The stack and where its nodes listen."""

    cluster: Cluster
    proxy_url: str
    prefill_url: str


@contextmanager
def running_stack(
    default_pair: ModelPair, tmp_path_factory: pytest.TempPathFactory, pool_mib: int
) -> Iterator[Running]:
    """The stack for the body; its worker keeps ``pool_mib`` of KV for prompts that begin the same."""
    pair = Pair(name=default_pair.name, hf_dir=str(default_pair.hf_dir), gguf=str(default_pair.gguf))
    cluster = cluster_on_free_ports(pair)
    cluster = msgspec.structs.replace(
        cluster,
        prefill=msgspec.structs.replace(cluster.prefill, max_step_tokens=STEP_TOKENS),
        decode=msgspec.structs.replace(cluster.decode, cell_type="bf16", pool_mib=pool_mib),
        link=msgspec.structs.replace(cluster.link, chunk_tokens=256),
        # Nothing is computed behind a test's back.
        proxy=msgspec.structs.replace(cluster.proxy, parity_share=0.0),
    )
    cluster = with_keys(cluster, tmp_path_factory.mktemp("keys"))
    with Stack(cluster, tmp_path_factory.mktemp("logs")) as stack:
        yield Running(cluster, stack.proxy_url, f"http://127.0.0.1:{cluster.prefill.port}")


@pytest.fixture(scope="session")
def stack(default_pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """All KV of every prompt is sent: nothing is reused."""
    with running_stack(default_pair, tmp_path_factory, 0) as running:
        yield running


@pytest.fixture
def http(stack: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.proxy_url, timeout=120, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def shipped_text() -> str:
    """The demo's text, about 1,000 tokens."""
    import isthmus

    return (Path(isthmus.__file__).parent / "prompts" / "first_light.txt").read_text()
