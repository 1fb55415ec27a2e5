"""A real vLLM that is killed while it answers: the worker goes on with the very words that it would have said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from proxy.app import create_app
from proxy.gateway import Gateway
from tests.e2e.conftest import Running
from tests.proxy.conftest import free_port, serving, wait_until
from transfer.config import dump

pytestmark = pytest.mark.engines

MAX_TOKENS = 60
START_S = 180.0


@dataclass
class Doomed:
    """A vLLM of its own, and a proxy in this process that knows it and the stack's worker."""

    vllm: subprocess.Popen[bytes]
    vllm_url: str
    gateway: Gateway
    http: httpx.Client


@contextmanager
def own_vllm(stack: Running, tmp_path: Path, nodes: tuple[str, ...] = ()) -> Iterator[Doomed]:
    """One for the body; its proxy knows ``nodes`` beside it."""
    port = free_port()
    own = f"127.0.0.1:{port}"
    prefill = msgspec.structs.replace(stack.cluster.prefill, port=port, nodes=(own, *nodes))
    proxy = msgspec.structs.replace(stack.cluster.proxy, port=free_port(), registry_port=0)
    cluster = msgspec.structs.replace(stack.cluster, prefill=prefill, proxy=proxy)
    config = tmp_path / "isthmus.toml"
    config.write_bytes(dump(cluster))
    command = [sys.executable, "-P", "-m", "isthmus", "prefill", "--config", str(config)]
    app = create_app(cluster)
    gateway: Gateway = app.state.gateway
    url = f"http://127.0.0.1:{proxy.port}"
    with (tmp_path / "vllm.log").open("wb") as log:
        vllm = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            with serving(app, proxy.port), httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
                wait_until(lambda: all(node.up for node in gateway.prefill) and gateway.workers.up, START_S)
                yield Doomed(vllm, f"http://{own}", gateway, http)
        finally:
            # With what watches it.
            with suppress(ProcessLookupError):
                os.killpg(vllm.pid, signal.SIGKILL)
            vllm.wait()


@pytest.fixture
def doomed(stack: Running, tmp_path: Path) -> Iterator[Doomed]:
    with own_vllm(stack, tmp_path) as doomed:
        yield doomed


def asked(gateway: Gateway, prompt: list[int], max_tokens: int = MAX_TOKENS) -> dict[str, Any]:
    return {
        "model": gateway.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


def texts(http: httpx.Client, body: dict[str, Any], headers: dict[str, str] | None = None) -> Iterator[str]:
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}, headers=headers) as response:
        assert response.headers["x-isthmus-route"] == "gpu"
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                yield from (choice["text"] for choice in chunk["choices"])


def test_the_worker_goes_on_where_vllm_was_killed(doomed: Doomed, shipped_text: str) -> None:
    gateway, http = doomed.gateway, doomed.http
    prompt = http.post("/tokenize", json={"prompt": shipped_text[:1500]}).json()["tokens"]
    body = asked(gateway, prompt)
    direct = httpx.post(f"{doomed.vllm_url}/v1/completions", json=body | {"return_token_ids": True}, timeout=60)
    undisturbed = direct.json()["choices"][0]["token_ids"]
    # Not forced, or it would have to stay: the worker is left out for a moment because it seems to fail.
    for node in gateway.workers:
        for _ in range(3):
            node.breaker.failed(time.monotonic_ns())
    stream = texts(http, body)
    said = [next(stream) for _ in range(12)]
    doomed.vllm.kill()
    assert doomed.vllm.wait(10) == -signal.SIGKILL
    answer = "".join([*said, *stream])

    entry = http.get("/ledger?last=1").json()["entries"][0]
    first, second = entry["attempts"]
    assert (entry["status"], entry["completion_tokens"]) == ("ok", MAX_TOKENS)
    assert (first["route"], second["route"]) == ("gpu", "cpu")
    done = first["completion_tokens"]
    assert 12 <= done < MAX_TOKENS
    rest = asked(gateway, [*prompt, *undisturbed[:done]], MAX_TOKENS - done)
    continued = http.post("/v1/completions", json=rest, headers={"X-Isthmus-Route": "cpu"}).json()
    before = gateway.renderer.vocabulary.text(undisturbed[:done])
    assert answer == before + continued["choices"][0]["text"]
