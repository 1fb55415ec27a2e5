from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from isthmus.cli import cli
from isthmus.pair_plan import GIB, Weights, plan, read_weights, verdict, weights_at
from transfer.config import Prefill
from transfer.errors import ConfigError

# Llama-3.1-8B, as its config.json has it.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
# Its parameters: the layers' matrices, and embeddings with norms.
WEIGHTS_8B = Weights(6_979_321_856, 1_050_939_392, 16_060_522_496)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    tensors = {
        "model.norm.weight": np.ones(4096, np.float32),
        "model.embed_tokens.weight": np.ones((8, 4), np.float16),
        "lm_head.weight": np.ones((8, 4), np.float16),
        "model.layers.0.mlp.up_proj.weight": np.ones((16, 4), np.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_weights_are_counted_by_what_quantization_does_to_them(model: Path) -> None:
    weights = read_weights(model)
    assert weights[:2] == (64, 4096 + 64)
    assert weights.stored_bytes == (model / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("bits", "gib"), [(None, 14.96), (16, 14.96), (8, 8.59), (4, 5.34)])
def test_an_8b_model_weighs_what_its_published_files_weigh(bits: int | None, gib: float) -> None:
    assert weights_at(WEIGHTS_8B, bits) / GIB == pytest.approx(gib, abs=0.02)


@pytest.mark.parametrize(
    ("vram_gib", "bits", "fits"), [(12, 4, True), (12, 8, False), (12, 16, False), (24, 16, True), (6, 4, False)]
)
def test_the_verdict_says_what_to_do(
    model: Path, monkeypatch: pytest.MonkeyPatch, vram_gib: int, bits: int, fits: bool
) -> None:
    monkeypatch.setattr("isthmus.pair_plan.read_weights", lambda _: WEIGHTS_8B)
    found = plan(model, vram_gib * GIB, bits, Prefill())
    assert found.kv_token_bytes == 128 * 1024
    parts = found.weights_bytes + found.activation_bytes + found.staging_bytes
    assert 0.7 * GIB < found.budget_bytes - parts - found.kv_bytes < GIB
    if fits:
        assert found.longest_prompt_tokens * found.kv_token_bytes <= found.kv_bytes
        assert f"max_model_len = {found.longest_prompt_tokens + 1}" in verdict(found)
    else:
        assert found.longest_prompt_tokens * found.kv_token_bytes <= max(0, found.kv_bytes)
        assert (f"--cpu-offload-gb={found.offload_gib}" in verdict(found)) == (found.longest_prompt_tokens == 0)


def test_a_prompt_is_no_longer_than_the_models_context(model: Path) -> None:
    assert plan(model, 80 * GIB, None, Prefill()).longest_prompt_tokens == 131072 - 1


def test_the_command_prints_a_table_and_the_verdict(model: Path) -> None:
    done = CliRunner().invoke(cli, ["pair", "plan", str(model), "--vram", "12GiB"])
    assert done.exit_code == 0, done.output
    assert "left for KV blocks" in done.output
    assert "fits: prompts of up to" in done.output


@pytest.mark.parametrize("vram", ["12", "twelve GB", "-3GB", "0GB", "12 parsecs"])
def test_a_size_that_is_none_is_refused_by_name(model: Path, vram: str) -> None:
    done = CliRunner().invoke(cli, ["pair", "plan", str(model), "--vram", vram])
    assert done.exit_code == 2
    assert "--vram" in done.output


def test_damaged_weights_are_named(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        read_weights(model)
