"""Real decode workers that are killed, or asked to end, in the middle of an answer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from isthmus.up import with_keys
from proxy.app import create_app
from proxy.gateway import Gateway
from tests.conftest import ModelPair
from tests.proxy.conftest import free_port, serving, wait_until
from transfer.config import Cluster, Decode, Pair, Prefill, Proxy, dump

pytestmark = pytest.mark.engines

MAX_TOKENS = 120
START_S = 120.0


@dataclass
class Workers:
    """Two real workers, the second found by its announcements, and a proxy without a prefill node."""

    gateway: Gateway
    http: httpx.Client
    processes: dict[str, subprocess.Popen[bytes]]
    commands: dict[str, list[str]]

    def stream(self, prompt: str, **more: Any) -> Iterator[str]:
        """The texts of an answer, as they come; it has no error in it."""
        body = {"model": "pair", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
        with self.http.stream("POST", "/v1/completions", json=body | {"stream": True} | more) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    assert "error" not in chunk, chunk
                    yield from (choice["text"] for choice in chunk["choices"])

    def serving_name(self) -> str:
        """The one worker that is busy."""
        (name,) = (node.name for node in self.gateway.workers if node.conversations)
        return name

    def entry(self) -> dict[str, Any]:
        return self.http.get("/ledger?last=1").json()["entries"][0]

    def start(self, name: str) -> None:
        self.processes[name] = subprocess.Popen(self.commands[name])
        wait_until(lambda: name in self.gateway.workers.nodes and self.gateway.workers.nodes[name].status, START_S)


@contextmanager
def workers_of(cluster: Cluster, folder: Path) -> Iterator[Workers]:
    app = create_app(cluster)
    running = Workers(app.state.gateway, httpx.Client(), {}, {})
    with ExitStack() as exits:
        exits.enter_context(serving(app, cluster.proxy.port))
        url = f"http://127.0.0.1:{cluster.proxy.port}"
        running.http = exits.enter_context(httpx.Client(base_url=url, timeout=120, trust_env=False))
        try:
            for index in range(2):
                ports = {name: free_port() for name in ("control_port", "kv_port", "kv_control_port")} if index else {}
                decode = msgspec.structs.replace(cluster.decode, **ports)
                config = folder / f"worker-{index}.toml"
                config.write_bytes(dump(msgspec.structs.replace(cluster, decode=decode)))
                name = f"127.0.0.1:{decode.control_port}"
                running.commands[name] = [sys.executable, "-P", "-m", "isthmus", "decode", "--config", str(config)]
                running.start(name)
            yield running
        finally:
            for process in running.processes.values():
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def workers(default_pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
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
