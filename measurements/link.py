"""How fast KV moves from one process's blocks into another's landing buffers, against bare ZeroMQ and memcpy."""

from __future__ import annotations

import multiprocessing
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cpu_decode.landing import LandingPlace, LandingPool, LandingReport
from cpu_decode.state import ChunkState
from measurements import result
from transfer.codecs import landing_codecs
from transfer.config import Link
from transfer.errors import IsthmusError, LinkError
from transfer.frames import HEADER_BYTES, Element
from transfer.geometry import KVGeometry
from transfer.layout import Elements, frame_elements, layers_per_frame
from transfer.messages import Landing, Ticket
from transfer.receiver import KVReceiver
from transfer.sender import KVSender

Sample = dict[str, Any]

# Llama-3.1-8B: 128 KiB of 16-bit KV a token. The values are synthetic, so entropy-coded sizes and speeds are not real.
GEOMETRY = KVGeometry(
    model_fingerprint="synthetic",
    num_layers=32,
    num_kv_heads=8,
    head_dim_k=128,
    head_dim_v=128,
    rope_dims=128,
    rope_theta=500000.0,
    rope_scaling="factors",
    sliding_window=0,
    vocab_size=128256,
)
DEADLINE_S = 60.0
ZMQ = "bare ZeroMQ"
MEMCPY = "memcpy"
CODECS = landing_codecs("bf16")


def run(json: Path | None, plot: Path | None, rounds: int, num_tokens: int) -> None:
    """Measure over loopback; print a table, write ``json`` and draw ``plot`` if given.

    Raises :class:`LinkError` if a transfer fails and :class:`ConfigError` for files that cannot be written.
    """
    if plot is not None:
        # Fail before measuring, not after.
        import matplotlib as _  # noqa: F401
    environment = result.environment()
    samples = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("link", total=rounds * (len(CODECS) + 2))
        for sample in measure(rounds, num_tokens):
            samples.append(sample)
            progress.advance(task)
    summary = summarize(samples)
    if json is not None:
        result.write(json, "link", environment, samples, summary)
    if plot is not None:
        draw(summary, plot)
    Console().print(table(summary))


def measure(rounds: int, num_tokens: int) -> Iterator[Sample]:
    """GB/s of 16-bit elements for each way in turn; the order shifts by one each round, the first is not counted."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = Link()
    receiver = KVReceiver(context, "127.0.0.1", GEOMETRY, frame_bytes=link.frame_mib << 20)
    bare = context.socket(zmq.PULL)
    bare.rcvhwm = 8
    port = bare.bind_to_random_port("tcp://127.0.0.1")
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=_send, args=(theirs, num_tokens, f"tcp://127.0.0.1:{port}"), daemon=True)
    child.start()
    blocks = synthetic(min(num_tokens, link.chunk_tokens))
    copy = np.empty_like(blocks)

    def memcpy() -> None:
        for _ in range(0, num_tokens, link.chunk_tokens):
            np.copyto(copy, blocks)

    pool = LandingPool(GEOMETRY, "bf16", link.chunk_tokens, (link.credit_chunks + 1) * chunk_bytes(link))
    ways: dict[str, Callable[[], None]] = {MEMCPY: memcpy, ZMQ: lambda: _receive_bare(bare, ours, num_tokens)}
    ways |= {codec: _receiving(receiver, pool, ours, codec, num_tokens) for codec in CODECS}
    names = list(ways)
    num_bytes = 2 * GEOMETRY.elements_per_token * num_tokens
    try:
        for turn in range(rounds + 1):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                began = time.monotonic_ns()
                ways[name]()
                if turn:
                    yield {"way": name, "round": turn, "gb_per_s": num_bytes / (time.monotonic_ns() - began)}
    finally:
        ours.send(None)
        child.join(DEADLINE_S)
        receiver.close()
        bare.close()
        context.term()


def chunk_bytes(link: Link) -> int:
    """About what one landing buffer takes."""
    return 2 * GEOMETRY.elements_per_token * (link.chunk_tokens + 1)


def synthetic(num_tokens: int) -> Elements:
    """Normally distributed bf16 KV, uint16 ``[num_layers, elements of one layer]``."""
    values = np.random.default_rng(0).standard_normal(frame_elements(GEOMETRY, num_tokens, 1)).astype(np.float32)
    layer = (values.view(np.uint32) >> 16).astype(np.uint16)
    return np.ascontiguousarray(np.broadcast_to(layer, (GEOMETRY.num_layers, layer.size)))


def _receiving(
    receiver: KVReceiver, pool: LandingPool, child: Connection, codec: str, num_tokens: int
) -> Callable[[], None]:
    """A transfer through the whole plane into bf16 landing buffers; a landed chunk's buffer is free at once."""
    link = Link()
    poller = zmq.Poller()
    for socket in (receiver.control, receiver.frames):
        poller.register(socket, zmq.POLLIN)

    def receive() -> None:
        done: list[LandingReport | IsthmusError] = []
        granted = link.credit_chunks

        def landed(chunk: ChunkState) -> None:
            nonlocal granted
            granted += 1
            pool.give_back(chunk.buffer)
            place.credit_chunks = granted
            receiver.grant(ticket.ticket, granted)

        place = LandingPlace(
            GEOMETRY,
            "bf16",
            codec,
            pool,
            num_tokens=num_tokens,
            chunk_tokens=link.chunk_tokens,
            credit_chunks=granted,
            on_chunk=landed,
            on_end=done.append,
            on_fail=done.append,
        )
        ticket = Ticket(
            request_id=codec,
            ticket=secrets.token_hex(16),
            kv_endpoint=f"tcp://127.0.0.1:{receiver.port}",
            codec=codec,
            landing=Landing(cell_type="bf16", rope_order="half"),
            chunk_tokens=link.chunk_tokens,
            credit_chunks=granted,
            deadline_ms=int(DEADLINE_S * 1000),
        )
        receiver.expect(ticket.ticket, place, granted)
        child.send(ticket)
        deadline_ns = time.monotonic_ns() + int(DEADLINE_S * 1e9)
        while not done:
            if not poller.poll(1000) and time.monotonic_ns() > deadline_ns:
                raise LinkError(f"a transfer with codec {codec} did not finish within {DEADLINE_S:.0f} s")
            receiver.turn()
        if isinstance(done[0], IsthmusError):
            raise done[0]

    return receive


def _receive_bare(socket: zmq.Socket[bytes], child: Connection, num_tokens: int) -> None:
    child.send(ZMQ)
    for _ in range(_frames_of(num_tokens)):
        if not socket.poll(int(DEADLINE_S * 1000)):
            raise LinkError("bare ZeroMQ fell silent")
        socket.recv_multipart(copy=False)


def _frames_of(num_tokens: int) -> int:
    """Frames that the plane cuts ``num_tokens`` into."""
    link = Link()
    whole, rest = divmod(num_tokens, link.chunk_tokens)
    counts = [link.chunk_tokens] * whole + [rest] * bool(rest)
    return sum(-(-GEOMETRY.num_layers // layers_per_frame(GEOMETRY, n, link.frame_mib << 20)) for n in counts)


def _send(orders: Connection, num_tokens: int, bare_endpoint: str) -> None:
    """The other process: sends what it is told to, until told None."""
    link = Link()
    chunks = [
        (tokens, synthetic(len(tokens)))
        for start in range(0, num_tokens, link.chunk_tokens)
        for tokens in (range(start, min(start + link.chunk_tokens, num_tokens)),)
    ]
    sender = KVSender(GEOMETRY, max_backlog_bytes=1 << 40, frame_bytes=link.frame_mib << 20)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    bare = context.socket(zmq.PUSH)
    bare.sndhwm = 4
    bare.connect(bare_endpoint)
    while (order := orders.recv()) is not None:
        if isinstance(order, Ticket):
            sender.open(order)
            for tokens, elements in chunks:
                sender.submit(order.ticket, tokens, 0, elements, Element.BF16, 0)
            sender.finish(order.ticket, num_tokens)
            continue
        for _, elements in chunks:
            group = layers_per_frame(GEOMETRY, elements.size // GEOMETRY.elements_per_token, link.frame_mib << 20)
            for first in range(0, GEOMETRY.num_layers, group):
                part = elements[first : first + group]
                bare.send_multipart([bytes(HEADER_BYTES), part.view(np.uint8).data], copy=False)
    sender.close()
    bare.close(linger=0)
    context.term()


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """Plain numbers by way, with ratios taken within a round."""
    rates = {(s["way"], s["round"]): s["gb_per_s"] for s in samples}
    rounds = sorted({s["round"] for s in samples})
    summary: dict[str, Any] = {}
    for way in (MEMCPY, ZMQ, *CODECS):
        values = [rates[way, turn] for turn in rounds]
        summary[way] = {
            "gb_per_s": statistics.median(values),
            "smallest": min(values),
            "largest": max(values),
            "vs_zmq": statistics.median(rates[way, turn] / rates[ZMQ, turn] for turn in rounds),
            "vs_raw": statistics.median(rates[way, turn] / rates["raw", turn] for turn in rounds),
        }
    summary["loopback_raw_gb_per_s"] = summary["raw"]["gb_per_s"]
    summary["loopback_raw_vs_zmq"] = summary["raw"]["vs_zmq"]
    return summary


def table(summary: dict[str, Any]) -> Table:
    """The summary for a terminal."""
    shown = Table(title="GB/s of 16-bit KV over loopback, medians", title_justify="left")
    shown.add_column("way", no_wrap=True)
    for column in ("GB/s", "smallest", "largest", "of bare ZeroMQ", "of raw"):
        shown.add_column(column, justify="right")
    for way in (MEMCPY, ZMQ, *CODECS):
        row = summary[way]
        shown.add_row(way, *(f"{row[key]:.2f}" for key in ("gb_per_s", "smallest", "largest", "vs_zmq", "vs_raw")))
    return shown


def draw(summary: dict[str, Any], path: Path) -> None:
    """Medians with smallest and largest, as a picture in the format of ``path``'s name."""
    from matplotlib.figure import Figure

    ways = [ZMQ, *CODECS]
    middle = np.array([summary[way]["gb_per_s"] for way in ways])
    spread = [
        middle - [summary[way]["smallest"] for way in ways],
        [summary[way]["largest"] for way in ways] - middle,
    ]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(ways, middle, yerr=spread, capsize=3)
    axes.axhline(1.25, color="grey", linestyle="--", label="10 Gbit/s")
    axes.set(ylabel="GB/s of 16-bit KV", title="blocks to landing buffers over loopback: median, smallest, largest")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
