"""``python -m tests.families.vllm_kv ORDERS``: the KV that the connector exports for one prompt of several models.

In a process of its own, for vLLM in a test's process pins its threads and reloads modules. ``ORDERS`` is a JSON file
``{"prompt": [...], "models": {HF_DIR: OUT}, "staged": bool, "kv_cache_dtype": str}``; each ``OUT`` becomes a ``.npz``
with ``k`` and ``v``, fp32 ``[num_layers, tokens, heads, dim]``. What is ``staged`` goes the way that devices do.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
import numpy as np

from gpu_prefill import connector, service
from tests.gpu_prefill.recorder import RecordingSender, make_ticket
from transfer.config import Cluster, Link, Pair

# A prompt of more is prefilled in several steps.
STEP_TOKENS = 128


def export(hf_dir: str, prompt: list[int], out: Path, kv_cache_dtype: str) -> None:
    """Run vLLM on the model in ``hf_dir`` and write ``out``."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown, get_kv_transfer_group
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cluster = Cluster(pair=Pair(name="m", hf_dir=hf_dir, gguf=""), link=Link(seal="none"))
    llm = LLM(
        hf_dir,
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_batched_tokens=STEP_TOKENS,
        max_num_seqs=8,
        enforce_eager=True,
        dtype="bfloat16",
        kv_cache_dtype=kv_cache_dtype,
        disable_hybrid_kv_cache_manager="--disable-hybrid-kv-cache-manager" in service.command(cluster)[0],
        kv_transfer_config=msgspec.json.decode(service.kv_transfer_config(cluster)),
    )
    ticket = make_ticket(1)
    parameters = SamplingParams(
        max_tokens=1,
        temperature=0,
        detokenize=False,
        extra_args={"kv_transfer_params": {"isthmus": msgspec.to_builtins(ticket)}},
    )
    llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
    exporter = get_kv_transfer_group()._exporter
    sender = exporter._sender
    if exporter._staging is not None:
        exporter._staging.close()
    assert sender.tokens(ticket.ticket) == list(range(len(prompt)))
    k, v = sender.planes(ticket.ticket)
    np.savez(out, k=k, v=v)
    llm.llm_engine.engine_core.shutdown()
    ensure_kv_transfer_shutdown()
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    os.environ |= service.ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    connector.KVSender = RecordingSender  # type: ignore[misc, assignment]
    # vLLM looks into every imported module's objects and trips over llvmlite's.
    sys.modules.pop("llvmlite.binding.ffi", None)
    orders = msgspec.json.decode(Path(sys.argv[1]).read_bytes())
    connector.is_staged = lambda _: orders.get("staged", False)
    for hf_dir, out in orders["models"].items():
        export(hf_dir, orders["prompt"], Path(out), orders.get("kv_cache_dtype", "auto"))
