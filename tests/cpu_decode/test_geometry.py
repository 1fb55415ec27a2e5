"""A GGUF's header, read without its vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from cpu_decode.geometry import read_geometry
from cpu_decode.gguf_header import HeaderReader
from transfer.errors import ConfigError

WORDS = 5000


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_head_count(2)
    writer.add_token_list([f"word {number}" for number in range(WORDS)])
    writer.add_token_types([1] * WORDS)
    writer.add_array("llama.few", [7, 8, 9])
    writer.add_string("general.description", "behind the lists")
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_stands_behind_long_lists_is_found(gguf):
    reader = HeaderReader(gguf)
    assert reader.get_field("general.description").contents() == "behind the lists"
    assert reader.get_field("llama.few").contents() == [7, 8, 9]
    assert reader.tensors[0].data.tolist() == [1.0] * 64
    assert read_geometry(gguf).vocab_size == WORDS


@pytest.mark.parametrize("num_bytes", [0, 20, 200, 5_000, 80_000, 100_000])
def test_a_file_that_ends_early_is_refused(gguf, tmp_path, num_bytes):
    assert gguf.stat().st_size > 100_000
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(gguf.read_bytes()[:num_bytes])
    with pytest.raises(ConfigError, match="is not a readable GGUF"):
        read_geometry(torn)


@pytest.mark.parametrize("count", [2**62, 2**64 - 1])
def test_a_list_that_claims_too_much_is_refused(gguf, tmp_path, count):
    data = bytearray(gguf.read_bytes())
    at = data.index(WORDS.to_bytes(8, "little"))
    data[at : at + 8] = count.to_bytes(8, "little")
    lying = tmp_path / "lying.gguf"
    lying.write_bytes(data)
    with pytest.raises(ConfigError, match="is not a readable GGUF"):
        read_geometry(lying)
