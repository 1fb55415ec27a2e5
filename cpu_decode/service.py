"""Starts one decode worker in this process."""

from __future__ import annotations

import os
import resource
import signal
from importlib.util import find_spec
from pathlib import Path

import structlog

from cpu_decode import binding, memory_speed, numa, profile, unsplit
from transfer import energy, keys
from transfer.config import Cluster, Decode, keys_folder
from transfer.errors import ConfigError
from transfer.geometry import NO_KV, KVGeometry

log = structlog.get_logger()


def run(cluster: Cluster, node: numa.Node | None = None) -> None:
    """Serve until SIGINT, or until SIGTERM and the end of what runs then; bound to ``node`` if there is one.

    Raises :class:`ConfigError` if the keys are not in order, the model cannot be served or the node cannot host it,
    :class:`EngineError` if llama.cpp fails later.
    """
    if find_spec("llama_cpp") is None:
        raise ConfigError("llama-cpp-python is not installed; install isthmus[decode]")
    # Read by the OpenMP runtime when llama.cpp is loaded. Threads at a barrier spin for microseconds, then sleep: a
    # token has hundreds of barriers, so sleeping at once doubles its time, and spinning on takes an idle engine's core.
    decode = profile.apply(cluster.decode)
    os.environ.setdefault("GOMP_SPINCOUNT", str(decode.spin_count))
    gguf = Path(cluster.pair.gguf)
    pins = node
    if node is None and decode.numa == "auto":
        # The rest of an unbound worker roams.
        pins = numa.filled(numa.read_topology(), decode.threads, decode.batch_threads)
    cpus = numa.compute_cpus(pins, decode.threads) if pins else ()
    batch_cpus = numa.compute_cpus(pins, decode.batch_threads or decode.threads) if pins else ()
    if node:
        # Before llama.cpp is loaded: what is touched first by a bound thread lies on its node.
        binding.bind(node)

    from cpu_decode.draft import DraftModel
    from cpu_decode.geometry import read_geometry
    from cpu_decode.llama import Model
    from cpu_decode.speculate import Guessing
    from cpu_decode.streams import open_context
    from cpu_decode.threadpool import PinnedThreads
    from cpu_decode.worker import Worker

    folder = keys_folder(cluster)
    own_keys = keys.server(folder) if folder else None
    export = cluster.prefill.export
    geometry = unsplit.geometry_or_no_kv(lambda: read_geometry(gguf), export=export)
    if node:
        numa.require_room(node, needed_bytes(gguf, geometry, decode))
    if decode.mlock:
        _raise_lock_limit()
    # Pages of a mapped file are the page cache's, wherever they are: a bound worker reads its own copy.
    model = Model(gguf, mapped=decode.mmap and node is None, locked=decode.mlock)
    if geometry != NO_KV:
        geometry = unsplit.geometry_or_no_kv(lambda: model.checked(geometry), export=export)
    if geometry == NO_KV:
        decode = unsplit.settings(decode)
    threads = len(cpus) or decode.threads or usable_cores()
    memory_bytes_per_s = memory_speed.read_bytes_per_s(threads)
    batch_threads = len(batch_cpus) or decode.batch_threads
    batch_tokens = max(decode.prefill_batch_tokens, decode.max_sequences)
    context = open_context(model, decode, batch_tokens, threads, batch_threads)
    draft = None
    if decode.draft_gguf and decode.speculate != "off":
        draft = DraftModel(
            Path(decode.draft_gguf),
            model,
            max_sequences=decode.max_sequences,
            threads=threads,
            batch_threads=batch_threads,
        )
    pinned = PinnedThreads(context, cpus, batch_cpus) if cpus else None
    if draft and cpus:
        draft.pin(cpus, batch_cpus)
    huge_page_bytes = binding.take_huge_pages() if decode.huge_pages else 0
    log.info(
        "model loaded",
        gguf=str(gguf),
        threads=threads,
        cells=context.num_cells,
        sequence_cells=context.sequence_cells,
        numa_node=node.number if node else None,
        cpus=list(cpus) or None,
        huge_page_bytes=huge_page_bytes,
    )
    if decode.mlock:
        _say_whether_locked(model.size_bytes)
    watch = binding.MemoryWatch(node.number) if node else None
    guessing = Guessing(decode.speculate, decode.speculate_tokens, profile.row_ns(decode), draft)
    worker = Worker(model, context, geometry, decode, cluster.link, own_keys, guessing)
    worker.memory_bytes_per_s = memory_bytes_per_s
    worker.power = energy.meter(energy.rapl(packages=energy.own_packages()))
    if watch:
        worker.memory = watch
        watch.start()
    if cluster.proxy.registry_port:
        worker.announce_to(f"tcp://{cluster.proxy.advertise_host}:{cluster.proxy.registry_port}")
    signal.signal(signal.SIGTERM, lambda *_: worker.drain())
    signal.signal(signal.SIGINT, lambda *_: worker.stop())
    worker.run()
    if watch:
        watch.stop()
    if draft:
        draft.close()
    context.close()
    if pinned:
        pinned.close()
    model.close()


def usable_cores() -> int:
    """Physical cores that this process may run on; SMT siblings add nothing to memory-bound decoding."""
    return len(numa.cores(os.sched_getaffinity(0)))


def needed_bytes(gguf: Path, geometry: KVGeometry, decode: Decode) -> int:
    """Memory that a worker takes: weights, cells, landing buffers and kept KV; what else there is, is small."""
    from cpu_decode.admission import allocated_cells
    from cpu_decode.state import row_bytes

    cells = allocated_cells(decode) * geometry.num_layers * sum(row_bytes(geometry, decode.cell_type))
    # Blocks of running sequences whose cells go to others (``window_blocks.py``).
    copies = cells if geometry.sliding_window and decode.pool_mib else 0
    files = [gguf, *([Path(decode.draft_gguf)] if decode.draft_gguf else [])]
    return sum(file.stat().st_size for file in files) + cells + copies + (decode.landing_mib + decode.pool_mib << 20)


def _raise_lock_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))


def _say_whether_locked(weights_bytes: int) -> None:
    locked = binding.locked_bytes()
    if locked < weights_bytes:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        log.info(
            "weights may be swapped out: the limit of locked memory is too low (systemd: LimitMEMLOCK=infinity)",
            locked_bytes=locked,
            limit_bytes=limit,
        )
