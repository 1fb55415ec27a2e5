"""A real worker in a thread of the test's process, so that a test may look into its cells."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu_decode.draft import DraftModel
from cpu_decode.llama import Context, Model
from cpu_decode.speculate import Guessing
from cpu_decode.streams import open_context
from cpu_decode.worker import Worker
from tests.cpu_decode.worker_client import WorkerClient
from transfer import keys
from transfer.config import Decode, Link
from transfer.geometry import KVGeometry
from transfer.layout import CellType
from transfer.sender import KVSender

MAX_SEQUENCES = 10
# A sequence has room for about a thousand tokens in streams, too, and its KV to gather.
LAYOUTS: dict[str, dict[str, Any]] = {
    "unified": {},
    "streams": {"cell_layout": "streams", "num_cells": 10_240, "landing_mib": 256},
}
LINK = Link(chunk_tokens=64, credit_chunks=2, frame_mib=1)


@dataclass
class Running:
    """A worker that serves in a thread, and what a test may look at."""

    worker: Worker
    client: WorkerClient
    model: Model
    context: Context
    geometry: KVGeometry
    sender: KVSender
    proxy_keys: keys.ClientKeys
    prefill_keys: keys.ClientKeys

    @property
    def empty(self) -> bool:
        """Whether no cell holds anything; the sequence that injection needs may be one more."""
        sequences = MAX_SEQUENCES + (1 if self.context.unified else 0)
        return all(self.context.cached_tokens(seq_id) == 0 for seq_id in range(sequences))


@contextmanager
def serving(
    model: Model,
    geometry: KVGeometry,
    cell_type: CellType,
    keys_folder: Path | None = None,
    *,
    draft: DraftModel | None = None,
    **settings: Any,
) -> Iterator[Running]:
    """Serve on ports of the system's choice for the body, with keys of its own or those of ``keys_folder``.

    Nothing is reused, waits or is guessed unless ``settings``, keys of ``[decode]``, say so. The worker must end when
    asked.
    """
    ours = {"num_cells": 4096, "landing_mib": 64, "pool_mib": 0, "max_queued": 0, "speculate": "off"}
    decode = Decode(
        control_port=0,
        kv_port=0,
        kv_control_port=0,
        max_sequences=MAX_SEQUENCES,
        cell_type=cell_type,
        threads=1,
        **ours | settings,
    )
    context = open_context(model, decode, batch_tokens=512, threads=1)
    guessing = Guessing(decode.speculate, decode.speculate_tokens, model=draft)
    with tempfile.TemporaryDirectory() as temporary:
        folder = keys_folder or Path(temporary)
        keys.make(folder)
        worker = Worker(model, context, geometry, decode, LINK, keys.server(folder), guessing)
        proxy_keys, prefill_keys = (keys.client(folder, role) for role in ("proxy", "prefill"))
        thread = threading.Thread(target=worker.run)
        thread.start()
        client = WorkerClient(worker.control_port, proxy_keys)
        sender = KVSender(geometry, max_backlog_bytes=1 << 28, frame_bytes=1 << 20, keys=prefill_keys)
        try:
            yield Running(worker, client, model, context, geometry, sender, proxy_keys, prefill_keys)
        finally:
            sender.close()
            client.close()
            worker.stop()
            thread.join(10)
            assert not thread.is_alive()
            context.close()
