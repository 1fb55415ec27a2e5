"""Every family that may be split, from the real vLLM's blocks through our state into the real llama.cpp.

The judge is transformers in fp32 on the same weights.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cpu_decode.geometry import read_geometry
from cpu_decode.llama import Batch, Context, Model
from cpu_decode.state import ChunkState, state_bytes
from gpu_prefill.geometry import read_geometry as read_hf_geometry
from gpu_prefill.geometry import read_rope_order
from tests.families.tiny_pair import FAMILIES, TinyPair, make
from transfer.geometry import KVGeometry, require_same
from transfer.layout import RopeOrder, interleaved_index

# The first test waits for vLLM to have started once for each family.
pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]

Array = npt.NDArray[np.float32]
# Two steps of vLLM's, and several windows.
PROMPT = [1, *random.Random(5).choices(range(3, 500), k=169)]
CHUNK_TOKENS, NEW_TOKENS = 64, 32
VLLM_S = 800
every_family = pytest.mark.parametrize("name", FAMILIES)


@dataclass(frozen=True)
class Exported:
    """What vLLM's side gave for one family: K and V, fp32 ``[num_layers, tokens, heads, dim]``."""

    pair: TinyPair
    k: Array
    v: Array


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Every family's KV, by the way that devices go."""
    folder = tmp_path_factory.mktemp("families")
    return export({name: make(name, folder) for name in FAMILIES}, folder, staged=True)


def export(pairs: dict[str, TinyPair], folder: Path, **orders: object) -> dict[str, Exported]:
    """Run ``tests.families.vllm_kv`` on ``pairs`` with these orders."""
    models = {str(pair.hf_dir): f"{folder / name}.npz" for name, pair in pairs.items()}
    (folder / "orders.json").write_text(json.dumps({"prompt": PROMPT, "models": models} | orders))
    done = subprocess.run(
        [sys.executable, "-m", "tests.families.vllm_kv", folder / "orders.json"],
        capture_output=True,
        text=True,
        timeout=VLLM_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for name, pair in pairs.items():
        with np.load(f"{folder / name}.npz") as arrays:
            found[name] = Exported(pair, arrays["k"], arrays["v"])
    return found


@pytest.fixture
def judged(exports: dict[str, Exported], name: str) -> tuple[Exported, Array, list[int]]:
    """A family, the judge's log probabilities ``[NEW_TOKENS, vocabulary]`` and its greedy tokens."""
    exported = exports[name]
    tokens = list(PROMPT)
    rows = []
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            rows.append(exported.pair.reference(torch.tensor([tokens])).logits[0, -1].log_softmax(-1).numpy())
        tokens.append(int(rows[-1].argmax()))
    return exported, np.stack(rows), tokens[len(PROMPT) :]


@pytest.fixture
def worker(exports: dict[str, Exported], name: str) -> Iterator[tuple[Context, KVGeometry, RopeOrder]]:
    gguf = exports[name].pair.gguf
    geometry, model = read_geometry(gguf), Model(gguf)
    model.checked(geometry)
    context = Context(model, num_cells=512, max_sequences=2, batch_tokens=256, threads=1, cell_type="f16")
    yield context, geometry, model.rope_order
    context.close()
    model.close()


def inject(context: Context, geometry: KVGeometry, k: Array, v: Array) -> None:
    """Put a prompt's KV, as a worker's cells want it, into sequence 0."""
    num_tokens = k.shape[1]
    for start in range(0, num_tokens, CHUNK_TOKENS):
        end = min(start + CHUNK_TOKENS, num_tokens)
        buffer = np.zeros(state_bytes(geometry, end - start, "f16"), np.uint8)
        chunk = ChunkState(buffer, geometry, "f16", start, end - start)
        for layer in range(geometry.num_layers):
            for plane, rows in zip(chunk.planes(layer, 1), (k[layer], v[layer]), strict=True):
                plane[:] = rows[start:end].astype(np.float16).reshape(-1).view(np.uint16)
        context.inject(chunk, 0)


def continue_with(context: Context, tokens: list[int]) -> Array:
    """Log probabilities before each of ``tokens`` and after the prompt, whose last position is computed again."""
    context.trim(0, len(PROMPT) - 1)
    batch, rows = Batch(1), []
    for position, token in enumerate([PROMPT[-1], *tokens[:-1]], len(PROMPT) - 1):
        batch.clear()
        row = batch.add(0, position, [token], want_logits=True)
        context.decode(batch)
        rows.append(torch.from_numpy(context.logits(row)).log_softmax(-1).numpy())
    return np.stack(rows)


def divergence(wanted: Array, found: Array) -> Array:
    return np.asarray((np.exp(wanted) * (wanted - found)).sum(axis=1))


def landing_order(name: str, rope_order: RopeOrder, geometry: KVGeometry, k: Array) -> Array:
    """K as the sender reorders it for cells of ``rope_order``."""
    pair_order = "interleaved" if FAMILIES[name].gguf_name == "glm4" else "half"
    return k[..., interleaved_index(geometry.head_dim_k, geometry.rope_dims)] if rope_order != pair_order else k


@every_family
def test_both_halves_agree_on_the_geometry(exports, name):
    pair = exports[name].pair
    geometry = read_geometry(pair.gguf)
    require_same(geometry, read_hf_geometry(pair.hf_dir))
    assert geometry.sliding_window == FAMILIES[name].metadata.get("attention.sliding_window", 0)
    assert bool(geometry.window_layers) == bool(geometry.sliding_window)
    assert len(geometry.window_layers) < geometry.num_layers


@every_family
def test_vllm_exports_what_transformers_computes(exports, name):
    from transformers import DynamicCache

    exported = exports[name]
    with torch.no_grad():
        # A cache that knows no windows keeps every position.
        cache = exported.pair.reference(torch.tensor([PROMPT]), past_key_values=DynamicCache()).past_key_values
    for found, kind in ((exported.k, "keys"), (exported.v, "values")):
        wanted = torch.stack([getattr(layer, kind)[0] for layer in cache.layers]).transpose(1, 2).numpy()
        cosine = (found * wanted).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(wanted, axis=-1)
        assert cosine.min() > 0.95
        assert np.median(cosine) > 0.999


def test_an_fp8_cache_is_exported_as_what_it_stands_for(exports, tmp_path):
    wanted = exports["llama"]
    found = export({"llama": wanted.pair}, tmp_path, kv_cache_dtype="fp8")["llama"]
    # e4m3 has three bits behind the point; vLLM cuts off what comes after. The first layer's inputs are the same.
    for exact, rounded in ((wanted.k[0], found.k[0]), (wanted.v[0], found.v[0])):
        assert not np.array_equal(exact, rounded)
        assert np.allclose(rounded, exact, rtol=1 / 8, atol=2**-9)


@every_family
def test_llama_cpp_goes_on_from_vllms_kv_as_transformers_does(worker, judged, name):
    context, geometry, rope_order = worker
    exported, wanted, tokens = judged
    assert rope_order != read_rope_order(exported.pair.hf_dir) or name not in ("llama", "mistral")
    inject(context, geometry, landing_order(name, rope_order, geometry, exported.k), exported.v)
    found = continue_with(context, tokens)
    assert divergence(wanted, found).mean() < 0.05
    best = np.sort(wanted, axis=1)[:, -2:]
    sure = best[:, 1] - best[:, 0] > 0.5
    assert sure.sum() >= 5
    assert (found.argmax(axis=1) == tokens)[sure].all()


@every_family
def test_keys_in_another_order_would_show(worker, judged):
    context, geometry, _ = worker
    exported, wanted, tokens = judged
    inject(context, geometry, exported.k[..., ::-1], exported.v)
    assert divergence(wanted, continue_with(context, tokens)).mean() > 0.5
