from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gpu_prefill.extract import Layer, find, gather, gather_into  # noqa: E402
from gpu_prefill.pages import Packing  # noqa: E402
from transfer.layout import interleaved_index  # noqa: E402

NUM_LAYERS, NUM_BLOCKS = 3, 6
BLOCK_IDS = [4, 1, 5, 2]


def logical(heads: int, block_size: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """K and V of every layer, ``[layers, 2, blocks, N, H, D]``, all different as far as 16 bits allow."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn((NUM_LAYERS, 2, NUM_BLOCKS, block_size, heads, dim), generator=generator).to(dtype)


def pack(kv: torch.Tensor, layout: str) -> list[Layer]:
    """The layers as a backend would register them, ``[B, H, N, 2 * D]``, written element by element."""
    _, _, blocks, block_size, heads, dim = kv.shape
    layers = []
    for k, v in kv:
        if layout in ("NHD", "HND"):
            page = torch.cat([k, v], dim=-1)
            layers.append(Layer(page.transpose(1, 2) if layout == "NHD" else page.transpose(1, 2).contiguous()))
            continue
        flat = np.zeros((blocks, heads, 2, block_size * dim), np.uint16)
        bits = [plane.view(torch.int16).numpy().view(np.uint16) for plane in (k, v)]
        for t in range(block_size):
            for d in range(dim):
                at_k = d * block_size + t
                at_v = t * dim + d
                if layout == "amx":
                    at_k = t // 16 * 16 * dim + d // 2 * 32 + t % 16 * 2 + d % 2
                    at_v = d // 16 * 16 * block_size + t // 2 * 32 + d % 16 * 2 + t % 2
                flat[:, :, 0, at_k] = bits[0][:, t, :, d]
                flat[:, :, 1, at_v] = bits[1][:, t, :, d]
        page = torch.from_numpy(flat.view(np.int16)).view(kv.dtype)
        layers.append(Layer(page.view(blocks, heads, block_size, 2 * dim)))
    return layers


def expected(kv: torch.Tensor, start: int, end: int, rope_dims: int) -> np.ndarray:
    """Token by token, in the order of transfer/layout.py."""
    bits = kv.contiguous().view(torch.int16).numpy().view(np.uint16)
    block_size, dim = kv.shape[3], kv.shape[5]
    order = interleaved_index(dim, rope_dims)
    rows = []
    for layer in bits:
        for plane, pick in ((0, order), (1, np.arange(dim))):
            rows += [
                layer[plane, BLOCK_IDS[token // block_size], token % block_size][:, pick].reshape(-1)
                for token in range(start, end)
            ]
    return np.concatenate(rows).reshape(len(bits), -1)


def taken(layers: list[Layer], packing: Packing, start: int, end: int, rope_dims: int) -> np.ndarray:
    """The same by the way that devices go."""
    _, heads, block_size, width = layers[0].cache.shape
    rows = torch.full((len(layers), 2, end - start, heads, width // 2), -7.0, dtype=layers[0].row_dtype)
    places = find(torch.tensor, BLOCK_IDS, range(start, end), block_size)
    gather_into(rows, layers, packing, places, rope_dims)
    return rows.view(torch.int16).numpy().view(np.uint16).reshape(len(layers), -1)


RANGES = [(0, 1), (0, 16), (0, 64), (3, 9), (5, 16), (15, 17), (16, 48), (7, 61), (33, 64), (63, 64)]


@pytest.mark.parametrize("layout", ["NHD", "HND", "vec", "amx"])
@pytest.mark.parametrize(
    ("heads", "dim", "rope_dims"), [(1, 16, 0), (3, 64, 64), (2, 80, 0), (2, 96, 48), (1, 128, 128)]
)
def test_gathers_every_range_as_the_slow_loop_does(layout: str, heads: int, dim: int, rope_dims: int) -> None:
    kv = logical(heads, 16, dim, torch.bfloat16)
    layers = pack(kv, layout)
    packing: Packing = "vec" if layout == "vec" else "amx" if layout == "amx" else "strided"
    for start, end in RANGES:
        found = gather(layers, packing, BLOCK_IDS, start, end, rope_dims)
        assert found.dtype == np.uint16
        wanted = expected(kv, start, end, rope_dims)
        assert np.array_equal(found, wanted), (start, end)
        assert np.array_equal(taken(layers, packing, start, end, rope_dims), wanted), (start, end)


def test_f16_bits_pass_unchanged() -> None:
    kv = logical(2, 32, 64, torch.float16)
    assert np.array_equal(gather(pack(kv, "vec"), "vec", BLOCK_IDS, 10, 100), expected(kv, 10, 100, 0))


def test_owns_what_it_returns() -> None:
    layers = pack(logical(1, 16, 16, torch.bfloat16), "NHD")
    found = gather(layers, "strided", BLOCK_IDS, 0, 32)
    before = found.copy()
    for layer in layers:
        layer.cache.zero_()
    assert np.array_equal(found, before)
    assert found.flags.c_contiguous
    assert found.flags.writeable


def test_refuses_a_token_beyond_the_block_table() -> None:
    layers = pack(logical(1, 16, 16, torch.bfloat16), "NHD")
    with pytest.raises(ValueError, match="token 64 lies in block 4, but the request has 4 blocks"):
        gather(layers, "strided", BLOCK_IDS, 60, 65)
    with pytest.raises(ValueError, match="token 64 lies in block 4"):
        find(torch.tensor, BLOCK_IDS, range(60, 65), 16)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_what_it_stands_for_rounded_once(layout: str, kind: torch.dtype) -> None:
    kv = logical(2, 16, 64, torch.bfloat16).to(kind)
    scales = [(1.0, 1.0), (0.013, 3.7), (0.5, 1.0)]
    layers = [
        Layer(pages.cache.to(kind), *each)
        for pages, each in zip(pack(kv.to(torch.bfloat16), layout), scales, strict=True)
    ]
    values = kv.float() * torch.tensor(scales).reshape(NUM_LAYERS, 2, 1, 1, 1, 1)
    wanted = expected(values.to(torch.bfloat16), 7, 61, 64)
    assert np.array_equal(gather(layers, "strided", BLOCK_IDS, 7, 61, 64), wanted)
    assert np.array_equal(taken(layers, "strided", 7, 61, 64), wanted)
