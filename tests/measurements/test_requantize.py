from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from measurements.requantize import FileType, requantized
from tests.conftest import ModelPair
from transfer.errors import EngineError


def test_the_same_matrices_in_another_type_and_not_a_word(
    default_pair: ModelPair, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    written = requantized(default_pair.gguf, tmp_path / "bf16.gguf", FileType.BF16)
    assert capfd.readouterr() == ("", "")
    before, after = ({t.name: t for t in gguf.GGUFReader(file).tensors} for file in (default_pair.gguf, written))
    assert before.keys() == after.keys()
    matrix = "blk.0.ffn_up.weight"
    assert before[matrix].shape.tolist() == after[matrix].shape.tolist()
    assert before[matrix].tensor_type != after[matrix].tensor_type == gguf.GGMLQuantizationType.BF16


def test_what_cannot_be_written_is_named(default_pair: ModelPair, tmp_path: Path) -> None:
    target = tmp_path / "no such folder" / "bf16.gguf"
    with pytest.raises(EngineError, match="no such folder"):
        requantized(default_pair.gguf, target, FileType.BF16)
