"""Two real decode workers in processes of their own, one pinned and one announced, behind a proxy in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec

from isthmus.children import die_with_parent
from proxy.app import create_app
from proxy.gateway import Gateway
from tests.proxy.conftest import free_port, serving, wait_until
from transfer.config import Cluster, dump

MAX_TOKENS = 120
START_S = 120.0


@dataclass
class Workers:
    """The processes, and a client of the proxy."""

    gateway: Gateway
    http: httpx.Client
    processes: dict[str, subprocess.Popen[bytes]]
    commands: dict[str, list[str]]

    def stream(self, prompt: str, headers: dict[str, str] | None = None, **more: Any) -> Iterator[str]:
        """The texts of an answer, as they come; it has no error in it."""
        body = {"model": self.gateway.model, "prompt": prompt, "max_tokens": MAX_TOKENS, "stream": True}
        body |= {"temperature": 0, "ignore_eos": True} | more
        with self.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
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

    def start(self, *names: str) -> None:
        """Start workers that do not run, and wait until the proxy may use them."""
        for name in names:
            self.processes[name] = subprocess.Popen(self.commands[name], preexec_fn=die_with_parent)
        nodes = self.gateway.workers.nodes
        wait_until(lambda: all(name in nodes and nodes[name].takes_requests for name in names), START_S)


@contextmanager
def workers_of(cluster: Cluster, folder: Path) -> Iterator[Workers]:
    """Two workers of ``cluster``, which has keys; their files are written to ``folder``."""
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
            running.start(*running.commands)
            yield running
        finally:
            for process in running.processes.values():
                process.kill()
                process.wait()
