"""``/v1/embeddings`` from a real vLLM that pools, over a small model with random weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from gpu_prefill.service import CPU_ENVIRONMENT, ENVIRONMENT
from isthmus.children import Child, Children
from isthmus.up import GRACE_S, START_DEADLINE_S
from tests.conftest import ModelPair
from tests.proxy.conftest import free_port, hf_dir, make_cluster, running  # noqa: F401 - a fixture

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

HIDDEN = 64
MAX_TOKENS = 96


@pytest.fixture(scope="module")
def model(default_pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of Qwen 3, with the tokenizer of the default pair."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("embedder")
    tokenizer = AutoTokenizer.from_pretrained(default_pair.hf_dir)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `vllm serve --runner pooling`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    variables = {**ENVIRONMENT, **CPU_ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = ["env", *(f"{name}={value}" for name, value in variables.items())]
    command += [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", f"--model={model}"]
    command += ["--runner=pooling", "--served-model-name=embedder", f"--port={port}", "--host=127.0.0.1"]
    command += [f"--max-model-len={MAX_TOKENS}", "--enforce-eager", "--max-num-seqs=8"]
    child = Child(name="embedder", command=command, is_healthy=lambda: _answers(url))
    logs = tmp_path_factory.mktemp("logs")
    with Children([child], logs, start_deadline_s=START_DEADLINE_S, grace_s=GRACE_S) as children:
        children.start(lambda _views: None)
        yield url


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False, timeout=0.5).is_success
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def proxy_url(engine: str, hf_dir: Path) -> Iterator[str]:  # noqa: F811
    with running(make_cluster(hf_dir, embeddings_url=engine)) as stack:
        yield stack.url


def test_embeddings_are_the_engines(engine: str, proxy_url: str):
    texts = ["An isthmus joins two lands.", "Und noch ein Satz."]
    with (
        openai.OpenAI(base_url=f"{proxy_url}/v1", api_key="none", max_retries=0, timeout=60) as client,
        openai.OpenAI(base_url=f"{engine}/v1", api_key="none", max_retries=0, timeout=60) as direct,
    ):
        # The client asks for base64, and decodes it, unless it is told otherwise.
        made = client.embeddings.create(model="embedder", input=texts)
        theirs = direct.embeddings.create(model="embedder", input=texts)
        as_numbers = client.embeddings.create(model="embedder", input=texts[0], encoding_format="float")
    ours = np.array([each.embedding for each in made.data])
    assert ours.shape == (2, HIDDEN)
    assert np.linalg.norm(ours, axis=1) == pytest.approx(1, abs=1e-3)
    assert ours == pytest.approx(np.array([each.embedding for each in theirs.data]), abs=1e-3)
    assert ours[0] == pytest.approx(np.array(as_numbers.data[0].embedding), abs=1e-3)
    assert made.usage.prompt_tokens == theirs.usage.prompt_tokens > 0


def test_what_the_engine_refuses_is_said_in_its_words(proxy_url: str):
    with httpx.Client(base_url=proxy_url, timeout=60, trust_env=False) as http:
        long = http.post("/v1/embeddings", json={"model": "embedder", "input": "word " * 500})
        unknown = http.post("/v1/embeddings", json={"model": "other", "input": "a"})
    assert (long.status_code, unknown.status_code) == (400, 404)
    assert str(MAX_TOKENS) in long.json()["error"]["message"]
    assert "other" in unknown.json()["error"]["message"]
