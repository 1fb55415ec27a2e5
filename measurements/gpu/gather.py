"""Gathering and encoding out of paged caches: byte-equal to plain indexing and to the sender's codecs, and how fast."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from gpu_prefill.encode import VERDICT_BYTES, encode, encodes, payload_bytes, rows_for
from gpu_prefill.extract import Layer, find, gather, gather_into, gather_rows
from gpu_prefill.streams import streams_of
from measurements.gpu.paged import GEOMETRY, LAYOUTS, Bits, caches_of, exported, times_ns
from transfer import codecs
from transfer.errors import CodecError
from transfer.frames import Element
from transfer.layout import Elements, Slab

if TYPE_CHECKING:
    from torch import Tensor

Sample = dict[str, Any]


class Shape(NamedTuple):
    """KV heads, head size, rotary elements to interleave, tokens a block."""

    heads: int
    dim: int
    rope_dims: int
    block_tokens: int


SHAPES = (
    Shape(8, 128, 128, 16),
    Shape(8, 128, 0, 64),
    Shape(3, 64, 64, 16),
    Shape(1, 256, 0, 32),
    Shape(2, 96, 48, 16),
    Shape(2, 80, 0, 128),
)
NUM_LAYERS, NUM_BLOCKS = 3, 12
DEVICE_CODECS = ("raw", "q8", "k8v4", "rows_q8_0", "rows_k8v4", "rows_q4_0")
# Llama-3.1-8B in bf16: 128 KiB a token.
SPEED_SHAPE = Shape(8, 128, 128, 16)
SPEED_LAYERS = 32


def check_random(device: str) -> Iterator[Sample]:
    """Every bit pattern, infinities and NaN too, in every layout, shape and 16-bit type."""
    import torch

    rng = np.random.default_rng(0)
    for shape in SHAPES:
        size = (NUM_LAYERS, 2, NUM_BLOCKS, shape.block_tokens, shape.heads, shape.dim)
        bits = rng.integers(0, 1 << 16, size, dtype=np.uint16)
        # Layers that every codec takes beside one that some must refuse.
        bits[1:] &= 0xC3FF
        for dtype in (torch.bfloat16, torch.float16):
            for layout in LAYOUTS:
                caches = caches_of(bits, layout, dtype, device)
                about = {"part": "equal", "kv": "random", "layout": layout, "dtype": str(dtype), **shape._asdict()}
                yield about | _compare(caches, bits, shape, rng)


def check_real(device: str, planes: Sequence[Bits], shape: Shape) -> Iterator[Sample]:
    """The same on a model's own KV: ``planes`` of bf16, K and V of each layer, ``[tokens * heads * dim]``."""
    import torch

    rng = np.random.default_rng(0)
    rows = np.stack(planes).reshape(len(planes) // 2, 2, -1, shape.heads, shape.dim)
    blocks = rows.shape[2] // shape.block_tokens
    bits = rows[:, :, : blocks * shape.block_tokens]
    bits = np.ascontiguousarray(bits.reshape(*rows.shape[:2], blocks, *(shape.block_tokens, shape.heads, shape.dim)))
    for layout in LAYOUTS:
        caches = caches_of(bits, layout, torch.bfloat16, device)
        about = {"part": "equal", "kv": "real", "layout": layout, "dtype": "torch.bfloat16", **shape._asdict()}
        yield about | _compare(caches, bits, shape, rng)


def _compare(caches: Sequence[Layer], bits: Bits, shape: Shape, rng: np.random.Generator) -> Sample:
    blocks = bits.shape[2]
    tokens, wrong, ranges = blocks * shape.block_tokens, 0, 0
    edges = [(0, 1), (0, tokens), (tokens - 1, tokens), (shape.block_tokens - 1, shape.block_tokens + 1)]
    for at, (start, end) in enumerate([*edges, *(sorted(rng.choice(tokens, 2, replace=False)) for _ in range(8))]):
        block_ids = [int(each) for each in rng.permutation(blocks)]
        for rope_dims in {0, shape.rope_dims}:
            span = range(int(start), int(end))
            wanted = exported(bits, block_ids, span.start, span.stop, rope_dims)
            found = gather(caches, "strided", block_ids, span.start, span.stop, rope_dims)
            wrong += int((found != wanted).sum())
            # Every range in `raw`; codecs do not care where tokens lay.
            for part in (slice(0, 1), slice(1, None)):
                names = DEVICE_CODECS[: None if at < len(edges) else 1]
                wrong += _wrong_bytes(names, caches[part], shape, block_ids, span, rope_dims, wanted[part])
            ranges += 1
    return {"ranges": ranges, "wrong_elements": wrong}


def _wrong_bytes(
    names: Sequence[str],
    caches: Sequence[Layer],
    shape: Shape,
    block_ids: Sequence[int],
    tokens: range,
    rope_dims: int,
    wanted: Elements,
) -> int:
    """Bytes of payloads made on the device that differ from the sender's, in the codecs ``names``."""
    geometry = msgspec.structs.replace(
        GEOMETRY, num_kv_heads=shape.heads, head_dim_k=shape.dim, head_dim_v=shape.dim, num_layers=len(caches)
    )
    element = Element.F16 if str(caches[0].cache.dtype).removeprefix("torch.") == "float16" else Element.BF16
    wrong = 0
    for codec in names:
        if not encodes(codec, shape.dim, shape.heads * len(tokens)):
            continue
        found = staged(codec, caches, block_ids, tokens, rope_dims).cpu().numpy()
        refused = bool(found[-VERDICT_BYTES:].any())
        try:
            payload = codecs.by_name(codec).encode(wanted.reshape(-1), element, Slab(geometry, len(caches), tokens))
        except CodecError:
            wrong += not refused
        else:
            wrong += refused or int((found[:-VERDICT_BYTES] != np.frombuffer(payload, np.uint8)).sum())
    return wrong


def staged(codec: str, caches: Sequence[Layer], block_ids: Sequence[int], tokens: range, rope_dims: int) -> Tensor:
    """The payload and the verdict of ``tokens``, uint8 on the caches' device, made as the exporter makes them."""
    import torch

    _, heads, block_tokens, width = caches[0].cache.shape
    streams = streams_of(caches[0].cache.device)
    shape = (len(caches), 2, len(tokens), heads, width // 2)
    size_bytes = payload_bytes(codec, len(tokens) * heads * width // 2, len(caches)) + VERDICT_BYTES
    out = torch.empty(size_bytes, dtype=torch.uint8, device=caches[0].cache.device)
    rows = rows_for(codec, out, shape, caches[0].row_dtype)
    gather_into(rows, caches, "strided", find(streams.to_device, block_ids, tokens, block_tokens), rope_dims)
    encode(codec, rows, out)
    return out


def speed(device: str, tokens: Sequence[int], rounds: int, layers: int = SPEED_LAYERS) -> Iterator[Sample]:
    """Times of gathering and encoding ``tokens`` tokens, and of copying as many bytes on the device and to the host."""
    import torch

    shape = SPEED_SHAPE
    blocks = max(tokens) // shape.block_tokens + 1
    caches = [
        Layer(
            torch.randn((blocks, shape.block_tokens, shape.heads, 2 * shape.dim), device=device)
            .to(torch.bfloat16)
            .transpose(1, 2)
        )
        for _ in range(layers)
    ]
    block_ids = [int(each) for each in np.random.default_rng(0).permutation(blocks)]
    for count in tokens:
        rows = gather_rows(caches, "strided", block_ids, 0, count)
        other = torch.empty_like(rows)
        work: dict[str, Callable[[], Any]] = {
            "gather by blocks": partial(gather_rows, caches, "strided", block_ids, 0, count, shape.rope_dims),
            "device copy": partial(other.copy_, rows),
        }
        for codec in DEVICE_CODECS:
            work[f"gather and {codec}"] = partial(_by_groups, codec, caches, block_ids, range(count), shape.rope_dims)
        if device != "cpu":
            pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            work["to pageable memory"] = rows.cpu
            work["to pinned memory"] = partial(pinned.copy_, rows, non_blocking=True)
        payload_bytes = rows.numel() * rows.element_size()
        for name, each in work.items():
            for turn, spent_ns in enumerate(times_ns(device, each, rounds)):
                yield {
                    "part": "speed",
                    "work": name,
                    "tokens": count,
                    "layers": layers,
                    "round": turn,
                    "payload_bytes": payload_bytes,
                    "ns": spent_ns,
                }


def _by_groups(codec: str, caches: Sequence[Layer], block_ids: Sequence[int], tokens: range, rope_dims: int) -> None:
    """Groups of layers as the exporter makes them with frames of 4 MiB."""
    _, heads, _, width = caches[0].cache.shape
    together = max(1, (4 << 20) // (2 * len(tokens) * heads * width))
    for first in range(0, len(caches), together):
        staged(codec, caches[first : first + together], block_ids, tokens, rope_dims)


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """Wrong elements of all comparisons, and GB of payload a second by work and tokens, medians."""
    equal = [sample for sample in samples if sample["part"] == "equal"]
    spent: dict[tuple[str, int], list[float]] = {}
    for sample in samples:
        if sample["part"] == "speed":
            spent.setdefault((sample["work"], sample["tokens"]), []).append(sample["payload_bytes"] / sample["ns"])
    payload_gb_per_s: dict[str, dict[str, float]] = {}
    for (work, tokens), found in spent.items():
        payload_gb_per_s.setdefault(work, {})[str(tokens)] = statistics.median(found)
    copied = payload_gb_per_s.get("device copy", {})
    pinned = payload_gb_per_s.get("to pinned memory", {})
    return {
        "comparisons": sum(sample["ranges"] for sample in equal),
        "wrong_elements": sum(sample["wrong_elements"] for sample in equal),
        "payload_gb_per_s": payload_gb_per_s,
        # By bytes of KV; `raw` would read and write every byte once where nothing is wasted, as the copy does.
        "device_copy_share": {
            codec: {tokens: payload_gb_per_s[f"gather and {codec}"][tokens] / rate for tokens, rate in copied.items()}
            for codec in DEVICE_CODECS
        },
        "pageable_vs_pinned": {
            tokens: payload_gb_per_s["to pageable memory"][tokens] / rate for tokens, rate in pinned.items()
        },
    }
