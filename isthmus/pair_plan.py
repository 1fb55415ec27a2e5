"""``isthmus pair plan``: what of a model fits into a GPU's memory, and how long a prompt may then be.

An estimate before anything is bought or downloaded twice; vLLM measures for itself when it starts, and logs its own
number of blocks.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from gpu_prefill.geometry import read_geometry
from gpu_prefill.staging import DEVICE_SLOTS
from transfer.config import Link, Prefill
from transfer.errors import ConfigError

GIB = 1 << 30
BLOCK_TOKENS = 16  # vLLM's block on CUDA
ELEMENT_BYTES = 2  # KV and activations in bf16
LOGIT_BYTES = 4
MAX_RUNNING = 128  # as gpu_prefill/service.py starts vLLM
# CUDA's context, its libraries' workspaces and vLLM's graphs: about this much on cards of the last generations.
CONTEXT_BYTES = int(0.8 * GIB)
# AWQ and GPTQ keep a 16-bit scale and a zero point for every 128 weights.
GROUP_OVERHEAD_BITS = 20 / 128


class Weights(NamedTuple):
    """Elements of the matrices that quantization shrinks, of everything else, and the bytes of all as stored."""

    matrix_elements: int
    other_elements: int
    stored_bytes: int


class Plan(NamedTuple):
    """Bytes by purpose; ``kv_bytes`` is what is left for KV, negative if the weights alone are too much."""

    budget_bytes: int
    weights_bytes: int
    activation_bytes: int
    staging_bytes: int
    step_kv_bytes: int
    kv_bytes: int
    kv_token_bytes: int
    longest_prompt_tokens: int

    @property
    def offload_gib(self) -> int:
        """Weights to leave in host memory (vLLM's ``--cpu-offload-gb``) so that one prompt of a step's length fits."""
        return max(0, math.ceil((self.step_kv_bytes - self.kv_bytes) / GIB)) if self.longest_prompt_tokens < 1 else 0


def plan(hf_dir: Path, vram_bytes: int, bits: int | None, prefill: Prefill) -> Plan:
    """Divide ``vram_bytes`` for the model in ``hf_dir``, its matrices at ``bits`` a weight or as they are stored.

    Activations are one step of ``prefill.max_step_tokens`` through the widest layer, and the logits of as many
    sequences as run; staging is the ring of frames that wait for the bus (``gpu_prefill/staging.py``). Raises
    :class:`ConfigError` as :func:`gpu_prefill.geometry.read_geometry` does.
    """
    geometry = read_geometry(hf_dir)
    weights = read_weights(hf_dir)
    config = json.loads((hf_dir / "config.json").read_text())
    step = prefill.max_step_tokens
    # Gate and up of the feed-forward part live at once, beside the residual stream and its normed copy.
    widest = 2 * config.get("intermediate_size", 4 * config["hidden_size"]) + 2 * config["hidden_size"]
    activation_bytes = step * widest * ELEMENT_BYTES + MAX_RUNNING * geometry.vocab_size * LOGIT_BYTES
    token_bytes = geometry.elements_per_token * ELEMENT_BYTES
    budget_bytes = int(vram_bytes * prefill.gpu_memory_utilization)
    weights_bytes = weights_at(weights, bits)
    staging_bytes = DEVICE_SLOTS * (Link().frame_mib << 20)
    kv_bytes = budget_bytes - CONTEXT_BYTES - weights_bytes - activation_bytes - staging_bytes
    fitting_tokens = max(0, kv_bytes) // (token_bytes * BLOCK_TOKENS) * BLOCK_TOKENS
    # vLLM samples a token of its own after a prompt, which needs a place.
    longest = max(0, min(fitting_tokens, _context_tokens(hf_dir, config)) - 1)
    return Plan(
        budget_bytes, weights_bytes, activation_bytes, staging_bytes, step * token_bytes, kv_bytes, token_bytes, longest
    )


def read_weights(hf_dir: Path) -> Weights:
    """Count the elements in the safetensors files of ``hf_dir``; :class:`ConfigError` if there are none to read."""
    from safetensors import SafetensorError, safe_open

    matrices = others = stored_bytes = 0
    files = sorted(hf_dir.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{hf_dir} holds no .safetensors file")
    for path in files:
        stored_bytes += path.stat().st_size
        try:
            with safe_open(path, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    shape = tensors.get_slice(name).get_shape()
                    embeds = "embed" in name or "lm_head" in name
                    if len(shape) > 1 and not embeds:
                        matrices += math.prod(shape)
                    else:
                        others += math.prod(shape)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} is not a sound safetensors file: {error}") from None
    return Weights(matrices, others, stored_bytes)


def weights_at(weights: Weights, bits: int | None) -> int:
    """Bytes of the weights in VRAM; embeddings and norms stay in 16 bits."""
    if bits is None:
        return weights.stored_bytes
    overhead = GROUP_OVERHEAD_BITS if bits < 16 else 0
    return int(weights.matrix_elements * (bits + overhead) / 8) + weights.other_elements * ELEMENT_BYTES


def table(found: Plan, vram_bytes: int) -> Table:
    """The plan for a terminal."""
    shown = Table(title=f"{vram_bytes / GIB:.1f} GiB of VRAM, an estimate", title_justify="left")
    shown.add_column("what")
    shown.add_column("GiB", justify="right")
    rows = (
        ("vLLM's share", found.budget_bytes),
        ("CUDA context, workspaces, graphs", -CONTEXT_BYTES),
        ("weights", -found.weights_bytes),
        ("activations of a step, logits", -found.activation_bytes),
        ("KV that waits for the bus", -found.staging_bytes),
        ("left for KV blocks", found.kv_bytes),
    )
    for what, num_bytes in rows:
        shown.add_row(what, f"{num_bytes / GIB:.2f}")
    return shown


def verdict(found: Plan) -> str:
    """One line that says what to do."""
    if found.longest_prompt_tokens >= 1:
        return (
            f"fits: prompts of up to {found.longest_prompt_tokens} tokens at {found.kv_token_bytes / 1024:.0f} KiB"
            f" each; set [prefill] max_model_len = {found.longest_prompt_tokens + 1} or less"
        )
    return (
        f"does not fit: use weights of fewer bits, or leave {found.offload_gib} GiB of them in host memory with"
        f' [prefill] extra_args = ["--cpu-offload-gb={found.offload_gib}"]; every step then reads them over PCIe,'
        " which pays only for long prompts"
    )


def _context_tokens(hf_dir: Path, config: dict[str, Any]) -> int:
    limit = config.get("max_position_embeddings")
    if not isinstance(limit, int):
        raise ConfigError(f"{hf_dir / 'config.json'} has no max_position_embeddings")
    return limit
