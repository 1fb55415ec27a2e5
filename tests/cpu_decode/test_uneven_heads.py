"""A model whose keys are longer than its values, with KV from the wire.

llama.cpp keeps both as they are of old files of models whose vLLM keeps a latent, which is why those are refused.
"""

from __future__ import annotations

import pytest

from cpu_decode.llama import Context, Model
from tests.cpu_decode.random_gguf import DEEPSEEK_LAYERS, HEADS, K_DIMS, ROPE_DIMS, V_DIMS, VOCABULARY, write
from tests.cpu_decode.serving import LAYOUTS, serving
from tests.cpu_decode.test_worker import send_kv
from transfer.geometry import KVGeometry
from transfer.messages import Sampling

GREEDY = Sampling(max_tokens=30, temperature=0.0, ignore_eos=True)
GEOMETRY = KVGeometry(
    model_fingerprint="",
    num_layers=DEEPSEEK_LAYERS,
    num_kv_heads=HEADS,
    head_dim_k=K_DIMS,
    head_dim_v=V_DIMS,
    rope_dims=ROPE_DIMS,
    rope_theta=10000.0,
    rope_scaling="none",
    sliding_window=0,
    vocab_size=VOCABULARY,
)
PROMPT = [3 + n * 37 % 500 for n in range(170)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_it_says_does_not_depend_on_where_its_kv_came_from(layout, tmp_path):
    model = Model(write("uneven", tmp_path))
    context = Context(model, num_cells=512, max_sequences=1, batch_tokens=256, threads=1, cell_type="bf16")
    with serving(model, GEOMETRY, "bf16", **LAYOUTS[layout]) as running:
        ticket = running.client.reserve(PROMPT, GREEDY, "local")
        running.client.start(ticket)
        computed, _, _ = running.client.collect(ticket)
        ticket = running.client.reserve(PROMPT, GREEDY, "kv")
        running.client.start(ticket, send_kv(running, context, ticket, PROMPT))
        sent, _, last = running.client.collect(ticket)
    assert sent == computed
    assert len(set(sent)) > 10
    assert last.report.kv_raw_bytes == 2 * len(PROMPT) * GEOMETRY.elements_per_token
    context.close()
    model.close()
