from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gpu_prefill.checkpoint import read_final_norm
from tests.gpu_prefill.checkpoints import LLAMA, write_model, write_shard
from transfer.errors import ConfigError


def test_bf16_bytes_pass_unchanged(tmp_path: Path) -> None:
    norm = bytes(range(256)) * 2
    assert read_final_norm(write_model(tmp_path, LLAMA, "BF16", norm)) == norm


def test_f32_rounds_to_nearest_even(tmp_path: Path) -> None:
    bits = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0xBF807FFF], "<u4")
    found = read_final_norm(write_model(tmp_path, LLAMA, "F32", bits.tobytes()))
    assert np.frombuffer(found, "<u2").tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0xBF80]


def test_f16_rounds_to_bf16(tmp_path: Path) -> None:
    halves = np.array([1.0, -0.5, 1.00390625], np.float16)
    found = read_final_norm(write_model(tmp_path, LLAMA, "F16", halves.tobytes()))
    assert np.frombuffer(found, "<u2").tolist() == [0x3F80, 0xBF00, 0x3F80]


def test_follows_the_index_to_the_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "model-00002.safetensors", "BF16", b"\x01\x02")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00002.safetensors"}}))
    assert read_final_norm(tmp_path) == b"\x01\x02"
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ConfigError, match=r"does not list model\.norm\.weight"):
        read_final_norm(tmp_path)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))
    with pytest.raises(ConfigError, match=r"cannot read .*gone\.safetensors: No such file"):
        read_final_norm(tmp_path)


def test_names_the_type_that_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stored as F8_E4M3"):
        read_final_norm(write_model(tmp_path, LLAMA, "F8_E4M3", b"\x00"))


def test_refuses_damaged_files(tmp_path: Path) -> None:
    path = write_model(tmp_path, LLAMA) / "model.safetensors"
    whole = path.read_bytes()
    write_shard(path, "BF16", b"\x00\x00", name="lm_head.weight")
    unnamed = path.read_bytes()
    damaged = {
        "lies outside the file": whole[:-1],
        "does not hold model.norm.weight": unnamed,
        "header claims": b"\xff" * 8 + whole[8:],
        "not a sound safetensors file": b"",
    }
    for complaint, data in damaged.items():
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=complaint):
            read_final_norm(tmp_path)
