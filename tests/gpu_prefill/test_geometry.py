from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpu_prefill.geometry import read_geometry, read_rope_order
from tests.gpu_prefill.checkpoints import LLAMA, write_model
from transfer.errors import ConfigError
from transfer.geometry import KVGeometry, fingerprint_norm


def test_reads_every_field_with_head_dim_from_the_hidden_size(tmp_path: Path) -> None:
    assert read_geometry(write_model(tmp_path, LLAMA)) == KVGeometry(
        model_fingerprint=fingerprint_norm(b"\x80\x3f" * 256),
        num_layers=2,
        num_kv_heads=2,
        head_dim_k=64,
        head_dim_v=64,
        rope_dims=64,
        rope_theta=100000.0,
        rope_scaling="none",
        sliding_window=0,
        vocab_size=1000,
    )
    assert read_rope_order(tmp_path) == "half"


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"head_dim": 128}, "head_dim_k", 128),
        ({"head_dim": None}, "head_dim_k", 64),
        ({"num_key_value_heads": None}, "num_kv_heads", 4),
        ({"partial_rotary_factor": 0.5}, "rope_dims", 32),
        ({"partial_rotary_factor": None}, "rope_dims", 64),
        ({"rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 5.0}}, "rope_dims", 16),
        ({"rope_parameters": None, "rope_theta": 500000.0}, "rope_theta", 500000.0),
        ({"rope_parameters": None}, "rope_theta", 10000.0),
        ({"rope_parameters": None}, "rope_scaling", "none"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling", "linear:4"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.5}}, "rope_scaling", "yarn:2.5"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling", "factors"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_scaling", "factors"),
        ({"sliding_window": 2048, "use_sliding_window": False}, "sliding_window", 0),
        ({"sliding_window": 4096}, "sliding_window", 0),
    ],
)
def test_understands_how_configs_differ(tmp_path: Path, change: dict[str, Any], field: str, value: object) -> None:
    assert getattr(read_geometry(write_model(tmp_path, LLAMA | change)), field) == value


GEMMA = LLAMA | {"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 7, "sliding_window": 512}


@pytest.mark.parametrize(
    ("change", "window_layers", "thetas"),
    [
        ({}, (0, 1, 2, 3, 4, 6), (100000.0, 100000.0)),
        ({"sliding_window_pattern": 2}, (0, 2, 4, 6), (100000.0, 100000.0)),
        ({"layer_types": ["full_attention"] + ["sliding_attention"] * 6}, (1, 2, 3, 4, 5, 6), (100000.0, 100000.0)),
        ({"sliding_window": None}, (), (100000.0, 0.0)),
        (
            {"rope_parameters": None, "rope_theta": 1e6, "rope_local_base_freq": 10000.0},
            (0, 1, 2, 3, 4, 6),
            (1e6, 10000.0),
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                    "sliding_attention": {"rope_theta": 20000.0, "rope_type": "default"},
                }
            },
            (0, 1, 2, 3, 4, 6),
            (1e6, 20000.0),
        ),
    ],
)
def test_reads_windows_as_every_transformers_has_written_them(
    tmp_path: Path, change: dict[str, Any], window_layers: tuple[int, ...], thetas: tuple[float, float]
) -> None:
    geometry = read_geometry(write_model(tmp_path, GEMMA | change))
    assert geometry.window_layers == window_layers
    assert geometry.sliding_window == (512 if window_layers else 0)
    assert (geometry.rope_theta, geometry.window_rope_theta) == thetas


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration cannot be split yet"),
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM cannot be split yet; these can: .*Llama"),
        ({"architectures": None}, "unnamed cannot be split"),
        ({"kv_lora_rank": 512}, "caches a latent"),
        ({"sliding_window": 2048}, "sliding_window 2048 is in use"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "LlamaForCausalLM with one cannot be split yet"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"num_hidden_layers": None}, r"config.json: num_hidden_layers must be a positive number, not None"),
        ({"vocab_size": "many"}, "vocab_size must be a positive number, not 'many'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor must be a positive number, not None"),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor must be a positive number, not 'half'"),
    ],
)
def test_refuses_what_cannot_be_split_with_the_reason(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_geometry(write_model(tmp_path, LLAMA | change))


def test_refuses_a_directory_without_a_sound_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json: No such file"):
        read_geometry(tmp_path)
    for text, complaint in (("{", "is not JSON"), ("[]", "does not hold an object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=complaint):
            read_geometry(tmp_path)
