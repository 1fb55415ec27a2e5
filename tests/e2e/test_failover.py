"""Decode workers that are killed while the real vLLM prefills for them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.e2e.conftest import Running
from tests.proxy.conftest import SplitIsBest, free_port, wait_until
from tests.proxy.real_workers import MAX_TOKENS, Workers, workers_of

pytestmark = pytest.mark.engines

SPLIT = {"X-Isthmus-Route": "split"}


@pytest.fixture(scope="module")
def workers(stack: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two workers and a proxy of their own, at the stack's vLLM."""
    ports = {name: free_port() for name in ("control_port", "kv_port", "kv_control_port")}
    decode = msgspec.structs.replace(
        stack.cluster.decode, **ports, num_cells=4096, threads=1, numa="off", landing_mib=256
    )
    proxy = msgspec.structs.replace(stack.cluster.proxy, port=free_port(), registry_port=free_port())
    cluster = msgspec.structs.replace(stack.cluster, decode=decode, proxy=proxy)
    folder: Path = tmp_path_factory.mktemp("workers")
    with workers_of(cluster, folder) as running:
        wait_until(lambda: running.gateway.prefill.up)
        yield running


@pytest.mark.parametrize("forced", [True, False])
def test_another_worker_goes_on_with_kv_from_vllm(workers: Workers, shipped_text: str, forced: bool) -> None:
    headers = SPLIT if forced else {}
    workers.gateway.dispatcher.planner.estimates = SplitIsBest()
    prompt = shipped_text[:2000]
    undisturbed = "".join(workers.stream(prompt, SPLIT))
    texts = workers.stream(prompt, headers)
    said = [next(texts) for _ in range(20)]
    name = workers.serving_name()
    workers.processes[name].kill()
    assert workers.processes[name].wait(10) == -signal.SIGKILL
    before = "".join(said)
    answer = before + "".join(texts)
    # Word for word only up to the seam: behind it stands vLLM's KV where llama.cpp's own would have been.
    assert undisturbed.startswith(before)
    ids = workers.http.post("/tokenize", json={"prompt": answer, "add_special_tokens": False}).json()["tokens"]
    # Nothing is repeated and nothing missing: so many tokens, give or take what the tokenizer would write otherwise.
    assert abs(len(ids) - MAX_TOKENS) <= 3
    entry = workers.entry()
    assert (entry["status"], entry["failed_over"]) == ("ok", "link_error")
    first, second = entry["attempts"]
    assert first["worker"] == name != second["worker"]
    assert second["route"] == "split"
    assert entry["completion_tokens"] == MAX_TOKENS
    workers.start(name)
    wait_until(lambda: workers.gateway.workers.nodes[name].takes_requests)
