"""Model directories small enough to write in a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 256,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
}


def write_model(hf_dir: Path, config: dict[str, Any], dtype: str = "BF16", norm: bytes = b"\x80\x3f" * 256) -> Path:
    hf_dir.mkdir(exist_ok=True)
    (hf_dir / "config.json").write_text(json.dumps(config))
    write_shard(hf_dir / "model.safetensors", dtype, norm)
    return hf_dir


def write_shard(path: Path, dtype: str, norm: bytes, name: str = "model.norm.weight") -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "other": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        name: {"dtype": dtype, "shape": [256], "data_offsets": [3, 3 + len(norm)]},
    }
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"abc" + norm)
