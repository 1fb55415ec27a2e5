"""One question by every route through the whole stack, vLLM on the GPU and llama.cpp on the CPUs beside it."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from isthmus.ask import ask, request_body
from isthmus.demo import question
from isthmus.up import Stack, cluster_on_free_ports
from transfer.config import Cluster, Pair

Sample = dict[str, Any]

ROUTES = ("split", "gpu", "cpu")
MAX_TOKENS = 64
# The bundle for hosts without a network holds one attention backend and no compiler's cache.
GPU_ARGS = ("--enforce-eager", "--attention-backend=FLASH_ATTN")
GPU_SHARE = 0.3


def serve(pair: Pair, device: str, rounds: int) -> Iterator[Sample]:
    """Ask by each route in turn, nothing cached anywhere; a sample holds the request's whole ledger entry.

    The first round is not counted. Raises :class:`EngineError` if a node does not start or a request fails.
    """
    cluster = _cluster(pair, device)
    with tempfile.TemporaryDirectory(prefix="isthmus-gpu-") as folder, Stack(cluster, Path(folder)) as stack:
        for turn in range(rounds + 1):
            for route in ROUTES:
                text = f"{turn} {route}\n\n{question()}"
                body = request_body(pair.name, text, max_tokens=MAX_TOKENS, ignore_eos=True)
                answer = ask(stack.proxy_url, body, route=route, on_text=lambda _: None)
                if turn:
                    yield {
                        "part": "serve",
                        "route": route,
                        "round": turn,
                        "ttft_ns": answer.ttft_ns,
                        "total_ns": answer.total_ns,
                        "tpot_ns": answer.tpot_ns,
                        "completion_tokens": answer.completion_tokens,
                        "ledger": answer.ledger,
                    }


def summarize(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Medians by route, in ns."""
    served = [sample for sample in samples if sample["part"] == "serve"]
    return {
        route: {
            name: statistics.median(sample[name] for sample in served if sample["route"] == route)
            for name in ("ttft_ns", "tpot_ns", "total_ns")
        }
        for route in dict.fromkeys(sample["route"] for sample in served)
    }


def _cluster(pair: Pair, device: str) -> Cluster:
    cluster = cluster_on_free_ports(pair)
    return msgspec.structs.replace(
        cluster,
        prefill=msgspec.structs.replace(
            cluster.prefill,
            prefix_caching=False,
            gpu_memory_utilization=GPU_SHARE,
            extra_args=() if device == "cpu" else GPU_ARGS,
        ),
        decode=msgspec.structs.replace(cluster.decode, pool_mib=0),
        proxy=msgspec.structs.replace(cluster.proxy, parity_share=0.0),
    )
