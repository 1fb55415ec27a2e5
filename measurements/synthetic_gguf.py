"""A GGUF of a model's shape with random weights, for measuring: neither speed nor memory depends on their values."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from transfer.errors import ConfigError


class Shape(NamedTuple):
    """What a Llama is like; without ``output`` the embedding serves as the last matrix too."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    vocab_size: int
    rope_theta: float
    output: bool


# As in the config.json of SmolLM2-360M, Llama-3.2-1B and Llama-3.1-8B.
SHAPES = {
    "360m": Shape(960, 32, 15, 5, 2560, 49_152, 100_000.0, output=False),
    "1b": Shape(2048, 16, 32, 8, 8192, 128_256, 500_000.0, output=False),
    "8b": Shape(4096, 32, 32, 8, 14_336, 128_256, 500_000.0, output=True),
}
# ggml/src/ggml-common.h, block_q8_0: an fp16 scale and 32 int8.
_Q8_0_ELEMENTS, _SCALE = 32, np.float16(0.0003)


def shape_of(name: str) -> Shape:
    """The shape ``name``; :class:`ConfigError` if it is not there."""
    if name not in SHAPES:
        raise ConfigError(f"there is no shape {name!r}, only {', '.join(SHAPES)} - at --shapes")
    return SHAPES[name]


@contextmanager
def synthetic_gguf(name: str) -> Iterator[Path]:
    """A Q8_0 GGUF of the shape ``name``, for the body; its vocabulary is the default pair's, filled up.

    Raises :class:`ConfigError` for a shape that is not there, or without room for the file in ``TMPDIR``.
    """
    shape = shape_of(name)
    with tempfile.TemporaryDirectory(prefix="isthmus-gguf-") as folder:
        path = Path(folder) / f"{name}-q8_0.gguf"
        try:
            _write(path, shape)
        except OSError as error:
            raise ConfigError(f"cannot write a model of shape {name} to {folder}: {error.strerror}") from None
        yield path


def _write(path: Path, shape: Shape) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    head_dim = shape.hidden_size // shape.num_heads
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(1 << 17)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.ffn_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    _add_vocabulary(writer, shape.vocab_size)

    # Every matrix of a size has the same values, each in a place of its own.
    matrices: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}

    def matrix(tensor: str, rows: int, columns: int) -> None:
        if (rows, columns) not in matrices:
            matrices[rows, columns] = _random_q8_0(rows, columns)
        writer.add_tensor(f"{tensor}.weight", matrices[rows, columns], raw_dtype=GGMLQuantizationType.Q8_0)

    def norm(tensor: str) -> None:
        writer.add_tensor(f"{tensor}.weight", np.ones(shape.hidden_size, np.float32))

    hidden, kv_size = shape.hidden_size, shape.num_kv_heads * head_dim
    matrix("token_embd", shape.vocab_size, hidden)
    norm("output_norm")
    if shape.output:
        matrix("output", shape.vocab_size, hidden)
    for layer in (f"blk.{number}" for number in range(shape.num_layers)):
        norm(f"{layer}.attn_norm")
        norm(f"{layer}.ffn_norm")
        for tensor, rows, columns in (
            ("attn_q", hidden, hidden),
            ("attn_k", kv_size, hidden),
            ("attn_v", kv_size, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", shape.ffn_size, hidden),
            ("ffn_up", shape.ffn_size, hidden),
            ("ffn_down", hidden, shape.ffn_size),
        ):
            matrix(f"{layer}.{tensor}", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, vocab_size: int) -> None:
    from gguf import GGUFReader, TokenType

    from isthmus.pair import default_pair

    fields = GGUFReader(default_pair().gguf).fields

    def known(key: str) -> Any:
        return fields[f"tokenizer.ggml.{key}"].contents()

    tokens, types = known("tokens"), known("token_type")
    more = vocab_size - len(tokens)
    writer.add_vocab_size(vocab_size)
    writer.add_tokenizer_model(known("model"))
    writer.add_tokenizer_pre(known("pre"))
    # Text, as most tokens are: a server that has none to send holds a token back until it has, and rates are of what
    # has come.
    writer.add_token_list([*tokens, *(f"filler{number}" for number in range(more))])
    writer.add_token_types([*types, *[int(TokenType.NORMAL)] * more])
    writer.add_token_merges(known("merges"))
    writer.add_bos_token_id(known("bos_token_id"))
    writer.add_eos_token_id(known("eos_token_id"))


def _random_q8_0(rows: int, columns: int) -> npt.NDArray[np.uint8]:
    """uint8 ``[rows, bytes of a row]``."""
    draw = np.random.default_rng(0)
    blocks = draw.integers(0, 256, (rows, columns // _Q8_0_ELEMENTS, 2 + _Q8_0_ELEMENTS), dtype=np.uint8)
    blocks[:, :, :2] = np.array([_SCALE]).view(np.uint8)
    return blocks.reshape(rows, -1)
