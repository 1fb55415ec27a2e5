"""Real decode workers that are killed, or asked to end, in the middle of an answer."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from isthmus.up import with_keys
from tests.conftest import ModelPair
from tests.proxy.conftest import free_port, wait_until
from tests.proxy.real_workers import MAX_TOKENS, Workers, workers_of
from transfer.config import Cluster, Decode, Pair, Prefill, Proxy

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def workers(default_pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two workers and no prefill node."""
    folder = tmp_path_factory.mktemp("cluster")
    control, kv, kv_control = (free_port() for _ in range(3))
    cluster = Cluster(
        pair=Pair(name="pair", hf_dir=str(default_pair.hf_dir), gguf=str(default_pair.gguf)),
        prefill=Prefill(port=free_port()),
        decode=Decode(
            control_port=control,
            kv_port=kv,
            kv_control_port=kv_control,
            num_cells=2048,
            max_sequences=4,
            cell_type="bf16",
            threads=1,
            numa="off",
            drain_s=60.0,
            speculate="off",
        ),
        proxy=Proxy(port=free_port(), registry_port=free_port()),
    )
    with workers_of(with_keys(cluster, folder / "keys"), folder) as running:
        yield running


PROMPT = "Once upon a time, in a village by the sea, there lived an old fisherman who"


def test_a_worker_is_killed_in_mid_stream(workers: Workers) -> None:
    undisturbed = "".join(workers.stream(PROMPT))
    assert workers.entry()["attempts"][0]["error"] is None
    texts = workers.stream(PROMPT)
    said = [next(texts) for _ in range(20)]
    name = workers.serving_name()
    workers.processes[name].kill()
    assert workers.processes[name].wait(10) == -signal.SIGKILL
    said += texts
    assert "".join(said) == undisturbed
    entry = workers.entry()
    assert (entry["status"], entry["reason"], entry["failed_over"]) == ("ok", "failed_over", "link_error")
    first, second = entry["attempts"]
    assert first["worker"] == name != second["worker"] == entry["worker"]
    assert entry["completion_tokens"] == first["completion_tokens"] + second["completion_tokens"] == MAX_TOKENS
    assert first["completion_tokens"] >= 20
    # It comes back without a restart of the proxy.
    workers.start(name)
    wait_until(lambda: workers.gateway.workers.nodes[name].takes_requests)


def test_a_worker_that_is_asked_to_end_finishes_its_answers_first(workers: Workers) -> None:
    texts = workers.stream(PROMPT)
    said = [next(texts) for _ in range(5)]
    name = workers.serving_name()
    workers.processes[name].terminate()
    wait_until(lambda: workers.gateway.workers.nodes[name].draining)
    # New requests go to the other one, and this one is still being served.
    other = "".join(workers.stream(PROMPT, max_tokens=2))
    assert workers.entry()["worker"] != name
    said += texts
    assert "".join(said).startswith(other)
    entry = workers.entry()
    assert [attempt["worker"] for attempt in entry["attempts"]] == [name]
    assert entry["completion_tokens"] == MAX_TOKENS
    assert workers.processes[name].wait(30) == 0
