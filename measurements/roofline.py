"""How long one step of an engine takes, and how large KV is: the formulas that the simulation stands on.

A step reads the weights once and every sequence's KV once, and computes every token that is in it. It takes as long as
the slower of the two: the roofline model (Williams, Waterman, Patterson, "Roofline", CACM 52:4, 2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from measurements.profiles import CodecCost, Device, LinkSpeed, ModelShape

_BITS_PER_ELEMENT = 16


class Chunk(NamedTuple):
    """``tokens`` of a prompt that are computed in one step, behind ``context`` tokens whose KV is there."""

    context: int
    tokens: int


def weight_bytes(model: ModelShape, engine: str) -> float:
    """The bytes that one step reads of the weights: all matrices, at the bits that ``engine`` holds them in."""
    bits = model.gpu_bits_per_weight if engine == "vllm" else model.cpu_bits_per_weight
    return (model.layer_params + model.output_params) * bits / 8


def kv_bytes_per_token(model: ModelShape) -> int:
    """K and V of one token in all layers: 2 * layers * kv_heads * head_dim elements of 16 bits."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * _BITS_PER_ELEMENT // 8


def kv_capacity_tokens(device: Device, model: ModelShape) -> int:
    """Tokens whose KV one engine has room for beside the weights; 0 if those do not fit."""
    room = device.memory_gib * 2**30 - weight_bytes(model, device.engine)
    return max(int(room / kv_bytes_per_token(model)), 0)


def flops(model: ModelShape, decoding: Sequence[int], chunks: Sequence[Chunk]) -> float:
    """Floating point operations of a step over sequences of ``decoding`` tokens and ``chunks`` of prompts.

    Two for every weight and token (Kaplan et al., "Scaling Laws for Neural Language Models", 2020, section 2.1): of the
    layers for all tokens, of the output matrix where logits are wanted. Attention takes 4 * heads * head_dim a layer
    for every position that a token looks at: a product with K and one with V.
    """
    prompt_tokens = sum(chunk.tokens for chunk in chunks)
    dense = 2.0 * model.layer_params * (len(decoding) + prompt_tokens)
    output = 2.0 * model.output_params * (len(decoding) + len(chunks))
    looked_at = sum(decoding) + sum(chunk.tokens * (chunk.context + (chunk.tokens + 1) / 2) for chunk in chunks)
    return dense + output + 4.0 * model.num_layers * model.num_heads * model.head_dim * looked_at


def step_seconds(device: Device, model: ModelShape, decoding: Sequence[int], chunks: Sequence[Chunk]) -> float:
    """How long the step takes on one engine of ``device``."""
    read_bytes = weight_bytes(model, device.engine)
    read_bytes += kv_bytes_per_token(model) * (sum(decoding) + sum(chunk.context for chunk in chunks))
    reading_s = read_bytes / (device.memory_gb_per_s * device.memory_efficiency * 1e9)
    computing_s = flops(model, decoding, chunks) / (device.compute_tflops * device.compute_efficiency * 1e12)
    rows = len(decoding)
    if decoding and device.engine == "llama.cpp":
        # Our worker adds so few tokens of prompts to sequences that decode that they cost what those cost.
        rows += sum(chunk.tokens for chunk in chunks)
    return max(reading_s, computing_s) + (device.step_overhead_ms + device.sequence_ms * rows) / 1e3


def prefill_seconds(device: Device, model: ModelShape, tokens: int) -> float:
    """How long ``tokens`` of prompts take on one engine that does nothing else, as one prompt."""
    starts = range(0, max(tokens, 1), device.step_tokens)
    chunks = [Chunk(start, min(device.step_tokens, tokens - start)) for start in starts]
    return sum(step_seconds(device, model, [], [chunk]) for chunk in chunks)


def wire_seconds(link: LinkSpeed, codec: CodecCost, model: ModelShape, tokens: float) -> float:
    """How long KV of ``tokens`` takes from one node to the other: encoding, wire and decoding run at once.

    So the slowest of the three decides; it is counted in bytes of 16-bit elements.
    """
    raw_bytes = tokens * kv_bytes_per_token(model)
    wire_gb_per_s = link.gbit_per_s / 8 * link.efficiency * _BITS_PER_ELEMENT / codec.bits_per_element
    return raw_bytes / (min(wire_gb_per_s, codec.encode_gb_per_s, codec.decode_gb_per_s) * 1e9)
