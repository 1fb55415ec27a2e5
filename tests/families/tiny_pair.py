"""A random model of a few hundred kilobytes, written twice, the way llama.cpp's conversion would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

VOCABULARY, CONTEXT = 512, 1024
HIDDEN, FEED_FORWARD, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 128, 256, 4, 4, 2, 32
WINDOW = 48
# All are used, each with its weight: between random ones bf16 would choose otherwise than fp32 now and then.
EXPERTS = 4

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Family:
    """How one family is configured in transformers, and what its GGUF does differently from Llama's."""

    architecture: str
    config: str
    gguf_name: str
    options: dict[str, Any] = field(default_factory=dict)
    # Q and K rows are stored as llama.cpp's NORM rope pairs them.
    permuted: bool = False
    # Norms are stored plus one.
    norm_offset: float = 0.0
    sharpness: float = 0.5
    embedding_scale: float = 1.0
    metadata: dict[str, int | float | str] = field(default_factory=dict)


_WINDOWS = {"sliding_window": WINDOW, "query_pre_attn_scalar": HEAD_DIM, "hidden_activation": "gelu_pytorch_tanh"}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", "llama", {"head_dim": HEAD_DIM}, permuted=True),
    "mistral": Family(
        "MistralForCausalLM", "MistralConfig", "llama", {"head_dim": HEAD_DIM, "sliding_window": None}, permuted=True
    ),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", "qwen2"),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", "qwen3", {"head_dim": HEAD_DIM}),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", "phi3", {"pad_token_id": 0, "sliding_window": None}),
    "glm4": Family(
        "Glm4ForCausalLM",
        "Glm4Config",
        "glm4",
        {"head_dim": HEAD_DIM, "attention_bias": True, "partial_rotary_factor": 0.5, "pad_token_id": 0},
        metadata={"rope.dimension_count": HEAD_DIM // 2},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        "gemma2",
        {"head_dim": HEAD_DIM, **_WINDOWS},
        norm_offset=1.0,
        sharpness=20.0,
        embedding_scale=0.05,
        metadata={
            "attention.sliding_window": WINDOW,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        "gemma3",
        {"head_dim": HEAD_DIM, "sliding_window_pattern": 3, **_WINDOWS},
        norm_offset=1.0,
        sharpness=20.0,
        embedding_scale=0.05,
        metadata={"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": 3},
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        "gpt-oss",
        {
            "head_dim": HEAD_DIM,
            "sliding_window": WINDOW,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": EXPERTS,
            "pad_token_id": 0,
            # llama.cpp rounds YaRN's ends, which the published GPT-OSS does not: that one is refused.
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": True,
                "original_max_position_embeddings": 4096,
            },
        },
        sharpness=-0.3,
        metadata={
            "attention.sliding_window": WINDOW,
            "expert_count": EXPERTS,
            "expert_used_count": EXPERTS,
            "expert_feed_forward_length": FEED_FORWARD,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
        },
    ),
}


@dataclass(frozen=True)
class TinyPair:
    """The two halves, and transformers' own fp32 model as the judge."""

    hf_dir: Path
    gguf: Path
    reference: Any


def make(name: str, folder: Path, kv_heads: int = KV_HEADS) -> TinyPair:
    """Write family ``name`` into ``folder``; the same weights every time."""
    family = FAMILIES[name]
    torch.manual_seed(11)
    config = getattr(transformers, family.config)(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=family.norm_offset > 0,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        **family.options,
    )
    model = getattr(transformers, family.architecture)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "sinks" in parameter_name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        # Predictions that a wrong key changes: sharp, and not just the last token again.
        model.model.norm.weight.add_(family.sharpness)
        model.model.embed_tokens.weight.mul_(family.embedding_scale)
    # What bf16 cannot hold would be a difference between the halves.
    model = model.to(torch.bfloat16)
    hf_dir = folder / name
    model.save_pretrained(hf_dir)
    path = folder / f"{name}.gguf"
    _write_gguf(path, family, config, {key: value.float().numpy() for key, value in model.state_dict().items()})
    # Read again: the model above has its rotary frequencies in bf16, too.
    return TinyPair(hf_dir, path, type(model).from_pretrained(hf_dir, dtype=torch.float32).eval())


def _write_gguf(path: Path, family: Family, config: Any, weights: dict[str, Array]) -> None:
    writer = gguf.GGUFWriter(path, family.gguf_name)
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if "rope.dimension_count" not in family.metadata:
        writer.add_rope_dimension_count(HEAD_DIM)
    for key, value in family.metadata.items():
        add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(f"{family.gguf_name}.{key}", value)
    add_vocabulary(writer)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf_name)
    names = gguf.get_tensor_name_map(arch, LAYERS)
    for name, weight in _apart(weights):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        converted = weight
        if family.permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
            converted = _permute(weight)
        if name.endswith("norm.weight"):
            converted = weight + np.float32(family.norm_offset)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), converted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _apart(weights: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    """The tensors with GPT-OSS's experts as llama.cpp wants them: rows are outputs, gates apart from what they gate."""
    for name, weight in weights.items():
        if ".experts." not in name:
            yield (f"{name}.weight" if name.endswith("sinks") else name), weight
            continue
        is_bias = name.endswith("_bias")
        rows = weight if is_bias else weight.swapaxes(1, 2)
        kind = "bias" if is_bias else "weight"
        layer, _, projection = name.removesuffix("_bias").rpartition(".")
        if projection == "gate_up_proj":
            yield f"{layer}.gate_proj.{kind}", np.ascontiguousarray(rows[:, ::2])
            yield f"{layer}.up_proj.{kind}", np.ascontiguousarray(rows[:, 1::2])
        else:
            yield f"{layer}.{projection}.{kind}", np.ascontiguousarray(rows)


def _permute(weight: Array) -> Array:
    """Rows of each head from halves to pairs: ``out[2 i + j] = in[j * half + i]``."""
    heads = weight.reshape(-1, 2, HEAD_DIM // 2, weight.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(weight.shape))


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
    pieces = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "Ġt"]
    pieces += [f"<{number}>" for number in range(len(pieces), VOCABULARY)]
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (VOCABULARY - 3))
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
