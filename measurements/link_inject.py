"""How fast landed chunks go into llama.cpp's cells, against memcpy, and for how long one holds the other sequences up.

The context is real, its model is not: zeros, with the KV geometry of Llama-3.1-8B and as little else as llama.cpp
loads. Injection never computes, so the weights do not matter.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from cpu_decode.llama import Context, Model
from cpu_decode.reservations import even_chunk_tokens
from cpu_decode.state import ChunkState, state_bytes
from measurements.link_synthetic import GEOMETRY, blocks
from transfer.config import Link

Sample = dict[str, Any]

CHUNK_TOKENS = 512
NUM_CELLS = 4096
HIDDEN, HEADS, FEED_FORWARD = 32, 8, 32


def measure(rounds: int, *, num_cells: int = NUM_CELLS, chunk_tokens: int = CHUNK_TOKENS) -> Iterator[Sample]:
    """Samples of both ways in turn, chunk by chunk until the cells are full; the first round is not counted.

    ``inject`` and ``memcpy`` move chunks of ``chunk_tokens``; then ``stall`` injects ones of the size that the decode
    worker would pick after this rate. Each has ``seconds`` and ``kv_bytes`` of one chunk.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        model = Model(_write_gguf(Path(folder) / "empty.gguf"))
        stack.callback(model.close)
        context = Context(model, num_cells=num_cells, max_sequences=1, batch_tokens=32, threads=1, cell_type="f16")
        stack.callback(context.close)
        source = ChunkBytes(chunk_tokens)
        # As large as the cells, so that the processor's caches help neither.
        copy = np.zeros((num_cells // chunk_tokens, source.chunk.num_bytes), np.uint8)
        rates = []
        for turn in range(rounds + 1):
            pairs = list(zip(_fill(context, source, num_cells), _copy(source, copy), strict=True))
            rates += [chunk_tokens / inject_s for inject_s, _ in pairs]
            for inject_s, copy_s in pairs if turn else ():
                yield {"way": "inject", "round": turn, "seconds": inject_s, "kv_bytes": source.chunk.num_bytes}
                yield {"way": "memcpy", "round": turn, "seconds": copy_s, "kv_bytes": source.chunk.num_bytes}
        even = ChunkBytes(even_chunk_tokens(min(Link().chunk_tokens, num_cells), float(np.median(rates))))
        for turn in range(1, rounds + 1):
            for seconds in _fill(context, even, num_cells):
                sample = {"way": "stall", "round": turn, "seconds": seconds, "kv_bytes": even.chunk.num_bytes}
                yield sample | {"chunk_tokens": even.num_tokens}


class ChunkBytes:
    """A landed chunk that can be moved to any position."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._buffer = np.zeros(state_bytes(GEOMETRY, num_tokens, "f16"), np.uint8)
        self.chunk = self.at(0)
        layer = blocks(num_tokens)[0] & np.uint16(0x3FFF)
        planes = self.chunk.planes(0, GEOMETRY.num_layers)
        for index, plane in enumerate(planes):
            plane[:] = layer[: plane.size] if index % 2 == 0 else layer[plane.size :]

    def at(self, start_token: int) -> ChunkState:
        """The same rows as the tokens from ``start_token`` on."""
        return ChunkState(self._buffer, GEOMETRY, "f16", start_token, self.num_tokens)


def _fill(context: Context, source: ChunkBytes, num_cells: int) -> Iterator[float]:
    """Seconds of each injection until the cells are full; they are empty before and after."""
    for start in range(0, num_cells - source.num_tokens + 1, source.num_tokens):
        chunk = source.at(start)
        began = time.monotonic_ns()
        context.inject(chunk, 0)
        yield (time.monotonic_ns() - began) / 1e9
    context.trim(0, 0)


def _copy(source: ChunkBytes, copy: np.ndarray[Any, np.dtype[np.uint8]]) -> Iterator[float]:
    """Seconds of copying the same bytes to each row of ``copy``."""
    whole = source.chunk.buffer[: source.chunk.num_bytes]
    for row in copy:
        began = time.monotonic_ns()
        np.copyto(row, whole)
        yield (time.monotonic_ns() - began) / 1e9


def _write_gguf(path: Path) -> Path:
    """A llama-type model of zeros with the KV geometry of Llama-3.1-8B."""
    from gguf import GGUFWriter, TokenType

    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [TokenType.CONTROL] * 2 + [TokenType.BYTE] * 256
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(GEOMETRY.num_layers)
    writer.add_context_length(NUM_CELLS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GEOMETRY.num_kv_heads)
    writer.add_key_length(GEOMETRY.head_dim_k)
    writer.add_value_length(GEOMETRY.head_dim_v)
    writer.add_rope_dimension_count(GEOMETRY.rope_dims)
    writer.add_rope_freq_base(GEOMETRY.rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * len(pieces))
    writer.add_token_types(types)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    k_width = GEOMETRY.num_kv_heads * GEOMETRY.head_dim_k
    v_width = GEOMETRY.num_kv_heads * GEOMETRY.head_dim_v
    shapes = {
        "attn_q": (HEADS * GEOMETRY.head_dim_k, HIDDEN),
        "attn_k": (k_width, HIDDEN),
        "attn_v": (v_width, HIDDEN),
        "attn_output": (HIDDEN, HEADS * GEOMETRY.head_dim_v),
        "attn_norm": (HIDDEN,),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (FEED_FORWARD, HIDDEN),
        "ffn_up": (FEED_FORWARD, HIDDEN),
        "ffn_down": (HIDDEN, FEED_FORWARD),
    }
    writer.add_tensor("token_embd.weight", np.zeros((len(pieces), HIDDEN), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer in range(GEOMETRY.num_layers):
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
