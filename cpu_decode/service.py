"""Starts one decode worker in this process."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import psutil
import structlog

from transfer import keys
from transfer.config import Cluster, keys_folder
from transfer.errors import ConfigError

log = structlog.get_logger()


def run(cluster: Cluster) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises :class:`ConfigError` if the keys are not in order or the model cannot be served, :class:`EngineError` if
    llama.cpp fails later.
    """
    if find_spec("llama_cpp") is None:
        raise ConfigError("llama-cpp-python is not installed; install isthmus[decode]")
    # Read by the OpenMP runtime when llama.cpp is loaded. Threads at a barrier spin for microseconds, then sleep: a
    # token has hundreds of barriers, so sleeping at once doubles its time, and spinning on takes an idle engine's core.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

    from cpu_decode.geometry import read_geometry
    from cpu_decode.llama import Context, Model
    from cpu_decode.worker import Worker

    folder = keys_folder(cluster)
    own_keys = keys.server(folder) if folder else None
    gguf = Path(cluster.pair.gguf)
    geometry = read_geometry(gguf)
    model = Model(gguf)
    threads = cluster.decode.threads or usable_cores()
    context = Context(
        model,
        num_cells=cluster.decode.num_cells,
        max_sequences=cluster.decode.max_sequences,
        batch_tokens=max(cluster.decode.prefill_batch_tokens, cluster.decode.max_sequences),
        threads=threads,
        cell_type=cluster.decode.cell_type,
    )
    log.info("model loaded", gguf=str(gguf), threads=threads, cells=cluster.decode.num_cells)
    worker = Worker(model, context, geometry, cluster.decode, cluster.link, own_keys)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    worker.run()
    context.close()
    model.close()


def usable_cores() -> int:
    """Physical cores that this process may run on; SMT siblings add nothing to memory-bound decoding."""
    allowed = len(os.sched_getaffinity(0))
    physical = psutil.cpu_count(logical=False) or allowed
    return max(1, min(allowed, physical))
