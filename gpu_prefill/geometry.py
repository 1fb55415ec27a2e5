"""The KV geometry of a Hugging Face directory, read without torch and without vLLM.

Only architectures whose KV cache was compared between vLLM and llama.cpp are accepted; see ``_ROPE_ORDER``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from gpu_prefill.checkpoint import read_final_norm
from transfer.errors import ConfigError, UnsplittableError
from transfer.geometry import KVGeometry, fingerprint_norm
from transfer.layout import RopeOrder

# How vLLM pairs rotary elements in the architectures that can be split: `is_neox_style` of `get_rope` in
# vllm/model_executor/models. All have a plain attention cache and a final norm called `model.norm.weight`.
_ROPE_ORDER: dict[str, RopeOrder] = {
    "CohereForCausalLM": "interleaved",
    "Gemma2ForCausalLM": "half",
    "Gemma3ForCausalLM": "half",
    "Glm4ForCausalLM": "interleaved",
    "GptOssForCausalLM": "half",
    "GraniteForCausalLM": "half",
    "LlamaForCausalLM": "half",
    "MistralForCausalLM": "half",
    "MixtralForCausalLM": "half",
    "Olmo2ForCausalLM": "half",
    "Phi3ForCausalLM": "half",
    "Qwen2ForCausalLM": "half",
    "Qwen2MoeForCausalLM": "half",
    "Qwen3ForCausalLM": "half",
    "Qwen3MoeForCausalLM": "half",
}

# Every so many layers one has no window, where the config does not list its layers' types (transformers 4).
_WINDOW_PERIOD = {"Gemma2ForCausalLM": 2, "Gemma3ForCausalLM": 6, "GptOssForCausalLM": 2}

_DEFAULT_ROPE_THETA = 10_000.0

Config = dict[str, Any]


def read_geometry(hf_dir: Path) -> KVGeometry:
    """Derive the geometry from ``config.json`` and the final norm of the safetensors checkpoint.

    Raises :class:`ConfigError` naming the file and the field if something is missing, or the reason if the
    architecture's KV cache cannot be split.
    """
    config = _read_config(hf_dir)
    name = _require_splittable(hf_dir, config)
    num_layers = _count(hf_dir, config, "num_hidden_layers")
    window_layers = _window_layers(name, config, num_layers)
    num_heads = _count(hf_dir, config, "num_attention_heads")
    head_dim = _count(hf_dir, config, "head_dim", _count(hf_dir, config, "hidden_size") // num_heads)
    rope, window_rope = _rope_parameters(config)
    return KVGeometry(
        model_fingerprint=fingerprint_norm(read_final_norm(hf_dir)),
        num_layers=num_layers,
        num_kv_heads=_count(hf_dir, config, "num_key_value_heads", num_heads),
        head_dim_k=head_dim,
        head_dim_v=head_dim,
        rope_dims=int(head_dim * _rope_number(hf_dir, rope, config, "partial_rotary_factor", 1.0)),
        rope_theta=_rope_number(hf_dir, rope, config, "rope_theta", _DEFAULT_ROPE_THETA),
        rope_scaling=_rope_scaling(hf_dir, rope),
        sliding_window=_count(hf_dir, config, "sliding_window") if window_layers else 0,
        vocab_size=_count(hf_dir, config, "vocab_size"),
        window_layers=window_layers,
        window_rope_theta=(
            _rope_number(hf_dir, window_rope, config, "rope_theta", _DEFAULT_ROPE_THETA) if window_layers else 0.0
        ),
    )


def read_rope_order(hf_dir: Path) -> RopeOrder:
    """The order in which vLLM keeps the rotary elements of K for this model; raises :class:`ConfigError`."""
    config = _read_config(hf_dir)
    return _ROPE_ORDER[_require_known(hf_dir, config)]


def _read_config(hf_dir: Path) -> Config:
    path = hf_dir / "config.json"
    try:
        config = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} does not hold an object")
    return config


def _require_known(hf_dir: Path, config: Config) -> str:
    named = config.get("architectures") or ["unnamed"]
    name = str(named[0])
    if name not in _ROPE_ORDER:
        raise UnsplittableError(f"{hf_dir}: {name} cannot be split yet; these can: {', '.join(_ROPE_ORDER)}")
    return name


def _require_splittable(hf_dir: Path, config: Config) -> str:
    """The architecture's name; raises :class:`UnsplittableError` with the reason if its KV cannot be split."""
    name = _require_known(hf_dir, config)
    if config.get("kv_lora_rank"):
        raise UnsplittableError(
            f"{hf_dir}: {name} with kv_lora_rank caches a latent, not K and V; it cannot be split yet"
        )
    window = config.get("sliding_window") or 0
    # Qwen configs carry a window that only `use_sliding_window` switches on.
    used = config.get("use_sliding_window", True) and 0 < window < config.get("max_position_embeddings", window + 1)
    if name not in _WINDOW_PERIOD and (used or "sliding_attention" in (config.get("layer_types") or ())):
        raise UnsplittableError(f"{hf_dir}: sliding_window {window} is in use; {name} with one cannot be split yet")
    return name


def _window_layers(name: str, config: Config, num_layers: int) -> tuple[int, ...]:
    """The layers that attend to a sliding window."""
    if name not in _WINDOW_PERIOD or not config.get("sliding_window"):
        return ()
    period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or _WINDOW_PERIOD[name]
    types = config.get("layer_types") or [
        "full_attention" if layer % period == period - 1 else "sliding_attention" for layer in range(num_layers)
    ]
    return tuple(layer for layer, kind in enumerate(types) if kind == "sliding_attention")


def _count(hf_dir: Path, config: Config, field: str, default: int | None = None) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if type(value) is not int or value < 1:
        raise ConfigError(f"{hf_dir / 'config.json'}: {field} must be a positive number, not {value!r}")
    return value


def _rope_parameters(config: Config) -> tuple[Config, Config]:
    """The rope of layers that see everything, and of those with a window.

    transformers 5 writes ``rope_parameters``, by type of layer where types differ; before, ``rope_scaling`` held what
    is not at the top level, and Gemma 3's windows rotated by ``rope_local_base_freq``.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "full_attention" in rope:
        return rope["full_attention"], rope.get("sliding_attention") or {}
    local = config.get("rope_local_base_freq")
    return rope, rope if local is None else {"rope_theta": local}


def _rope_number(hf_dir: Path, rope: Config, config: Config, field: str, default: float | None = None) -> float:
    """A number from the rope parameters, from the config's top level, or the default."""
    found = (value for value in (rope.get(field), config.get(field), default) if value is not None)
    value = next(found, None)
    if not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"{hf_dir / 'config.json'}: {field} must be a positive number, not {value!r}")
    return float(value)


def _rope_scaling(hf_dir: Path, rope: Config) -> str:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    match kind:
        case "default":
            return "none"
        case "yarn" if not rope.get("truncate", True):
            # K and Q would be turned by different angles, more so with every position.
            raise UnsplittableError(
                f"{hf_dir / 'config.json'}: llama.cpp rounds where YaRN begins and ends, rope_parameters with"
                f" truncate = false do not; the model cannot be split"
            )
        case "linear" | "yarn":
            return f"{kind}:{_rope_number(hf_dir, rope, {}, 'factor'):g}"
        case "llama3" | "longrope" | "su":
            return "factors"
    raise UnsplittableError(
        f"{hf_dir / 'config.json'}: rope_type {kind!r} is unknown to llama.cpp; the model cannot be split"
    )
