"""Two real vLLMs, one of which is killed while it serves: the other one goes on with what it did."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from proxy.placement import ranked
from tests.e2e.conftest import Running
from tests.e2e.test_vllm_killed import MAX_TOKENS, Doomed, asked, own_vllm, texts
from tests.proxy.conftest import wait_until

pytestmark = pytest.mark.engines

GPU, SPLIT = {"X-Isthmus-Route": "gpu"}, {"X-Isthmus-Route": "split"}


@pytest.fixture
def doomed(stack: Running, tmp_path: Path) -> Iterator[Doomed]:
    """A vLLM of its own beside the stack's."""
    with own_vllm(stack, tmp_path, (stack.prefill_url.removeprefix("http://"),)) as doomed:
        yield doomed


def prompts_for(node: str, doomed: Doomed, text: str) -> Iterator[list[int]]:
    """Prompts that prefer ``node``."""
    for begin in range(0, len(text), 50):
        tokens = doomed.http.post("/tokenize", json={"prompt": text[begin : begin + 1500]}).json()["tokens"]
        if ranked(tokens, list(doomed.gateway.prefill))[0] == node:
            yield tokens


def test_another_vllm_goes_on_with_a_stream_and_with_a_split(doomed: Doomed, stack: Running, shipped_text: str) -> None:
    gateway, http = doomed.gateway, doomed.http
    lost, other = gateway.prefill.nodes
    prompts = prompts_for(lost, doomed, shipped_text)
    streamed, split = next(prompts), next(prompts)
    direct = asked(gateway, streamed) | {"return_token_ids": True, "cache_salt": "alone"}
    undisturbed = httpx.post(f"{doomed.vllm_url}/v1/completions", json=direct, timeout=60).json()["choices"][0]

    stream = texts(http, asked(gateway, streamed), GPU)
    said = [next(stream) for _ in range(12)]
    os.killpg(doomed.vllm.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as client:
        answered = client.submit(http.post, "/v1/completions", json=asked(gateway, split), headers=SPLIT)
        wait_until(lambda: gateway.prefill.nodes[lost].load.occupancy._requests == 2)
        os.killpg(doomed.vllm.pid, signal.SIGKILL)
        text = "".join([*said, *stream])
        answer = answered.result().json()

    by_route = {entry["route"]: entry for entry in http.get("/ledger").json()["entries"]}
    assert {route: entry["status"] for route, entry in by_route.items()} == {"gpu": "ok", "split": "ok"}
    for entry in by_route.values():
        assert [each["prefill_node"] for each in entry["attempts"]] == [lost, other]
        assert entry["completion_tokens"] == MAX_TOKENS

    # Not a token is missing or said twice.
    done = by_route["gpu"]["attempts"][0]["completion_tokens"]
    rest = asked(gateway, [*streamed, *undisturbed["token_ids"][:done]], MAX_TOKENS - done) | {"cache_salt": "alone"}
    continued = httpx.post(f"{stack.prefill_url}/v1/completions", json=rest, timeout=60).json()["choices"][0]
    assert 12 <= done < MAX_TOKENS
    assert text == gateway.renderer.vocabulary.text(undisturbed["token_ids"][:done]) + continued["text"]
    again = http.post("/v1/completions", json=asked(gateway, split), headers=SPLIT).json()
    assert answer["choices"][0]["text"] == again["choices"][0]["text"]
    wait_until(lambda: not gateway.prefill.nodes[lost].up)
    assert http.get("/health").json()["prefill"] == "up"
