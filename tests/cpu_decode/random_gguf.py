"""Random models of a few hundred kilobytes (their tensors: ``src/models`` of llama.cpp)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np

from tests.families.tiny_pair import CONTEXT, VOCABULARY, add_vocabulary

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM = 64, 128, 4, 2, 16
# Of a recurrent model.
INNER, STATE, STEP_RANK, KERNEL = 2 * HIDDEN, 8, 8, 4
# Of latent attention.
DEEPSEEK_LAYERS, LATENT, Q_LATENT, ROPE_DIMS, K_DIMS, V_DIMS = 3, 32, 48, 8, 24, 16


class _Tensors:
    def __init__(self, writer: gguf.GGUFWriter) -> None:
        self._writer, self._random = writer, np.random.default_rng(7)

    def matrix(self, name: str, *shape: int, scale: float = 0.15) -> None:
        """Random weights of a shape such as NumPy writes it: llama.cpp's in reverse."""
        self._writer.add_tensor(name, (scale * self._random.standard_normal(shape)).astype(np.float32))

    def norm(self, name: str, size: int = HIDDEN, sharpness: float = 0.0) -> None:
        values = 1.0 + sharpness + 0.2 * self._random.standard_normal(size)
        self._writer.add_tensor(f"{name}.weight", values.astype(np.float32))

    def feed_forward(self, layer: str) -> None:
        self.norm(f"{layer}.ffn_norm")
        self.matrix(f"{layer}.ffn_gate.weight", FEED_FORWARD, HIDDEN)
        self.matrix(f"{layer}.ffn_up.weight", FEED_FORWARD, HIDDEN)
        self.matrix(f"{layer}.ffn_down.weight", HIDDEN, FEED_FORWARD)


def write(kind: str, folder: Path) -> Path:
    """A model of that kind, the same weights every time."""
    path = folder / f"{kind}.gguf"
    architecture, add = _KINDS[kind]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_layer_norm_rms_eps(1e-5)
    add_vocabulary(writer)
    tensors = _Tensors(writer)
    tensors.matrix("token_embd.weight", VOCABULARY, HIDDEN, scale=0.5)
    tensors.matrix("output.weight", VOCABULARY, HIDDEN, scale=0.5)
    add(writer, tensors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _recurrent(writer: gguf.GGUFWriter, tensors: _Tensors) -> None:
    writer.add_block_count(3)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(KERNEL)
    writer.add_ssm_inner_size(INNER)
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_time_step_rank(STEP_RANK)
    tensors.norm("output_norm", sharpness=0.5)
    for layer in ("blk.0", "blk.1", "blk.2"):
        tensors.norm(f"{layer}.attn_norm")
        tensors.matrix(f"{layer}.ssm_in.weight", 2 * INNER, HIDDEN)
        tensors.matrix(f"{layer}.ssm_conv1d.weight", INNER, KERNEL, scale=0.5)
        tensors.matrix(f"{layer}.ssm_conv1d.bias", INNER)
        tensors.matrix(f"{layer}.ssm_x.weight", STEP_RANK + 2 * STATE, INNER)
        tensors.matrix(f"{layer}.ssm_dt.weight", INNER, STEP_RANK)
        tensors.matrix(f"{layer}.ssm_dt.bias", INNER)
        # A state that is forgotten slowly.
        writer.add_tensor(f"{layer}.ssm_a", np.full((INNER, STATE), -0.1, np.float32))
        tensors.matrix(f"{layer}.ssm_d", INNER, scale=1.0)
        tensors.matrix(f"{layer}.ssm_out.weight", HIDDEN, INNER)


def _hybrid(writer: gguf.GGUFWriter, tensors: _Tensors) -> None:
    kv_heads = [0, KV_HEADS, 0, KV_HEADS]
    writer.add_block_count(len(kv_heads))
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_shortconv_l_cache(KERNEL)
    tensors.norm("token_embd_norm", sharpness=0.5)
    for number, kv in enumerate(kv_heads):
        layer = f"blk.{number}"
        tensors.norm(f"{layer}.attn_norm")
        tensors.feed_forward(layer)
        if kv:
            tensors.norm(f"{layer}.attn_q_norm", HEAD_DIM)
            tensors.norm(f"{layer}.attn_k_norm", HEAD_DIM)
            tensors.matrix(f"{layer}.attn_q.weight", HIDDEN, HIDDEN)
            tensors.matrix(f"{layer}.attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN)
            tensors.matrix(f"{layer}.attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN)
            tensors.matrix(f"{layer}.attn_output.weight", HIDDEN, HIDDEN)
        else:
            tensors.matrix(f"{layer}.shortconv.conv.weight", HIDDEN, KERNEL, scale=0.5)
            tensors.matrix(f"{layer}.shortconv.in_proj.weight", 3 * HIDDEN, HIDDEN)
            tensors.matrix(f"{layer}.shortconv.out_proj.weight", HIDDEN, HIDDEN)


def _latent(writer: gguf.GGUFWriter, tensors: _Tensors) -> None:
    """Keeps the latent, and computes with it."""
    writer.add_head_count_kv(1)
    writer.add_key_length(LATENT + ROPE_DIMS)
    writer.add_value_length(LATENT)
    writer.add_key_length_mla(K_DIMS)
    writer.add_value_length_mla(V_DIMS)
    for layer in _deepseek(writer, tensors):
        tensors.matrix(f"{layer}.attn_k_b.weight", HEADS, LATENT, K_DIMS - ROPE_DIMS)
        tensors.matrix(f"{layer}.attn_v_b.weight", HEADS, V_DIMS, LATENT)


def _uneven(writer: gguf.GGUFWriter, tensors: _Tensors) -> None:
    """As files of the time before: keeps the keys and the shorter values that the latent stands for."""
    writer.add_head_count_kv(HEADS)
    writer.add_key_length(K_DIMS)
    writer.add_value_length(V_DIMS)
    for layer in _deepseek(writer, tensors):
        tensors.matrix(f"{layer}.attn_kv_b.weight", HEADS * (K_DIMS - ROPE_DIMS + V_DIMS), LATENT)


def _deepseek(writer: gguf.GGUFWriter, tensors: _Tensors) -> Iterator[str]:
    """Everything but what the latent is turned into; yields each layer."""
    writer.add_block_count(DEEPSEEK_LAYERS)
    writer.add_leading_dense_block_count(DEEPSEEK_LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_expert_feed_forward_length(FEED_FORWARD)
    writer.add_expert_shared_count(0)
    writer.add_head_count(HEADS)
    writer.add_q_lora_rank(Q_LATENT)
    writer.add_kv_lora_rank(LATENT)
    writer.add_rope_dimension_count(ROPE_DIMS)
    writer.add_rope_freq_base(10000.0)
    tensors.norm("output_norm", sharpness=0.5)
    for layer in (f"blk.{number}" for number in range(DEEPSEEK_LAYERS)):
        tensors.norm(f"{layer}.attn_norm")
        tensors.norm(f"{layer}.attn_q_a_norm", Q_LATENT)
        tensors.norm(f"{layer}.attn_kv_a_norm", LATENT)
        tensors.matrix(f"{layer}.attn_q_a.weight", Q_LATENT, HIDDEN)
        tensors.matrix(f"{layer}.attn_q_b.weight", HEADS * K_DIMS, Q_LATENT)
        tensors.matrix(f"{layer}.attn_kv_a_mqa.weight", LATENT + ROPE_DIMS, HIDDEN)
        tensors.matrix(f"{layer}.attn_output.weight", HIDDEN, HEADS * V_DIMS)
        tensors.feed_forward(layer)
        yield layer


# What llama.cpp calls each, and what writes it.
_KINDS: dict[str, tuple[str, Callable[[gguf.GGUFWriter, _Tensors], None]]] = {
    "recurrent": ("mamba", _recurrent),
    "hybrid": ("lfm2", _hybrid),
    "latent": ("deepseek2", _latent),
    "uneven": ("deepseek2", _uneven),
}
