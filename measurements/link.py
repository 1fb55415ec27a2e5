"""How fast KV moves from one process's blocks into another's landing buffers, and what a request notices of it.

Every path is measured in the same way: one process serves (``link_receiver.py``), the other orders, sends and times
(``link_sender.py``). On loopback the serving one is a child of this one; over a shaped link both are children, each in
a network namespace; between two hosts a person starts both.
"""

from __future__ import annotations

import json as jsonlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console
from rich.progress import Progress

from isthmus.ports import free_ports
from measurements import link_exposed, link_namespaces, link_receiver, link_sender, result
from measurements.link_exposed import Prompt
from measurements.link_sender import Peer, Sample
from measurements.link_summary import CHECKED, IPERF3, MEMCPY, ZMQ, ZMQ_COPIED, ZMQ_KEPT, summarize, tables
from measurements.link_synthetic import GEOMETRY, TOKEN_BYTES, Chunk, chunks
from transfer.codecs import landing_codecs
from transfer.config import Link
from transfer.errors import ConfigError, EngineError
from transfer.seal import SealName

CODECS = landing_codecs("bf16", GEOMETRY)
SEALED: tuple[SealName, ...] = ("integrity", "aes-gcm")
LOOPBACK_TOKENS = 2048
# At 10 Gbit/s a transfer takes about a second.
PATH_TOKENS = 8192
SHAPED_PORT = 7311
END_S = 10.0
EXPOSED_EVERY_ROUNDS = 2

Way = Callable[[], Sample]


def run(json: Path | None, plot: Path | None, rounds: int, num_tokens: int | None, *, shaped: bool) -> None:
    """Measure loopback, injection and, if ``shaped``, a link of 10 Gbit/s; print, write ``json`` and draw ``plot``.

    A transfer is of ``num_tokens``, or of as many as suit the path.
    Raises :class:`LinkError` if a transfer fails and :class:`ConfigError` for what this host lacks.
    """
    if shaped:
        link_namespaces.require()
    _measure(json, plot, lambda progress: _on_this_host(progress, rounds, num_tokens, shaped=shaped), "shaped_10g")


def run_peer(json: Path | None, plot: Path | None, rounds: int, num_tokens: int | None, endpoint: str) -> None:
    """Measure the path to the process that serves at ``endpoint``; print, write and draw as :func:`run` does."""
    parse_endpoint(endpoint, "--peer")

    def measured(progress: Progress) -> Iterator[Sample]:
        with _peer(endpoint) as peer:
            yield from over_path(progress, peer, rounds, num_tokens or PATH_TOKENS)

    _measure(json, plot, measured, "path")


def run_serve(endpoint: str) -> None:
    """Serve one run at ``endpoint``; :class:`ConfigError` if that is no address of this host."""
    link_receiver.serve(*parse_endpoint(endpoint, "--serve"))


def parse_endpoint(endpoint: str, option: str) -> tuple[str, int]:
    """Host and port of ``tcp://HOST:PORT``; :class:`ConfigError` naming ``option`` if it is not that."""
    parts = urlsplit(endpoint)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if parts.scheme != "tcp" or not host or not port or parts.path:
        raise ConfigError(f"{option} {endpoint!r} must be tcp://HOST:PORT, such as tcp://192.168.1.7:7311")
    return host, port


def _measure(json: Path | None, plot: Path | None, measured: Callable[[Progress], Iterator[Sample]], path: str) -> None:
    if plot is not None:
        # Fail before measuring, not after.
        import matplotlib as _  # noqa: F401
    environment = result.environment()
    with Progress(console=Console(stderr=True)) as progress:
        samples = list(measured(progress))
    summary = summarize(samples, path)
    if json is not None:
        result.write(json, "link", environment, samples, summary)
    if plot is not None:
        from measurements.link_plot import draw

        draw(summary, plot)
    for table in tables(summary):
        Console().print(table)


def _on_this_host(progress: Progress, rounds: int, num_tokens: int | None, *, shaped: bool) -> Iterator[Sample]:
    # It needs llama.cpp, which a prefill host at one end of a path does not have.
    from measurements import link_inject

    with _local_peer() as peer, _local_peer() as bare_peer:
        yield from over_loopback(progress, peer, bare_peer, rounds, num_tokens or LOOPBACK_TOKENS)
    if shaped:
        # The measuring process shows its own.
        progress.stop()
        yield from over_shaped_link(rounds, num_tokens or PATH_TOKENS)
        progress.start()
    task = progress.add_task("injection", total=None)
    for sample in link_inject.measure(rounds):
        yield {"part": "inject", **sample}
        progress.advance(task)


def over_loopback(progress: Progress, peer: Peer, bare_peer: Peer, rounds: int, num_tokens: int) -> Iterator[Sample]:
    """Every codec, every seal, memcpy and bare ZeroMQ in turn, a prompt of ``num_tokens`` each.

    ``bare_peer`` serves bare messages only; ``peer`` everything else.
    """
    link = Link()
    prompt = chunks(num_tokens, link.chunk_tokens)
    copies = [np.empty_like(elements) for _, elements in prompt]

    def memcpy() -> Sample:
        began = time.monotonic_ns()
        for (_, elements), copy in zip(prompt, copies, strict=True):
            np.copyto(copy, elements)
        return {"kv_bytes": num_tokens * TOKEN_BYTES, "seconds": (time.monotonic_ns() - began) / 1e9}

    ways: dict[str, Way] = {MEMCPY: memcpy, ZMQ_KEPT: lambda: link_sender.bare(peer, prompt, link, copied=False)}
    landed = [(tokens, copy) for (tokens, _), copy in zip(prompt, copies, strict=True)]
    ways[CHECKED] = lambda: link_sender.checked(prompt, landed, link)
    ways |= _bare_ways(bare_peer, prompt, link) | _plane_ways(peer, prompt, link, CODECS)
    yield from _in_turn(progress, "loopback", ways, rounds)


def over_path(progress: Progress, peer: Peer, rounds: int, num_tokens: int) -> Iterator[Sample]:
    """Goodput by every way, then what a prefill of as many tokens exposes, then the receiver's memory."""
    link = Link()
    parts = chunks(num_tokens, link.chunk_tokens)
    ways: dict[str, Way] = {}
    if peer.has_iperf3:
        ways[IPERF3] = lambda: link_sender.iperf3(peer, num_tokens * TOKEN_BYTES)
    ways |= _bare_ways(peer, parts, link) | _plane_ways(peer, parts, link, ("raw", "q8"))
    yield from _in_turn(progress, "path", ways, rounds)
    prefill = link_exposed.Prefilling(peer, Prompt(num_tokens))
    exposures: dict[str, Way] = {
        "raw": lambda: prefill.exposed("raw", "none"),
        "q8": lambda: prefill.exposed("q8", "none"),
        "raw aes-gcm": lambda: prefill.exposed("raw", "aes-gcm"),
        "raw late": lambda: prefill.exposed("raw", "none", late=True),
        "q8 late": lambda: prefill.exposed("q8", "none", late=True),
        "raw serial": lambda: prefill.exposed("raw", "none", overlap=False),
    }
    lone: dict[str, Way] = {
        "raw": lambda: link_exposed.lone_frame(peer, "raw", "none"),
        "q8": lambda: link_exposed.lone_frame(peer, "q8", "none"),
    }
    fewer = max(1, rounds // EXPOSED_EVERY_ROUNDS)
    yield from _in_turn(progress, "frame", lone, fewer)
    yield from _in_turn(progress, "exposed", exposures, fewer)
    fresh: dict[str, Way] = {"raw": lambda: prefill.exposed("raw", "none", fresh=True)}
    yield from _in_turn(progress, "memory", fresh, 1)


def _bare_ways(peer: Peer, prompt: list[Chunk], link: Link) -> dict[str, Way]:
    return {
        ZMQ: lambda: link_sender.bare(peer, prompt, link, copied=False),
        ZMQ_COPIED: lambda: link_sender.bare(peer, prompt, link, copied=True),
    }


def _plane_ways(peer: Peer, prompt: list[Chunk], link: Link, codecs: tuple[str, ...]) -> dict[str, Way]:
    plain = {codec: partial(link_sender.plane, peer, codec, "none", prompt, link) for codec in codecs}
    sealed = {f"raw {seal}": partial(link_sender.sealed_plane, peer, seal, prompt, link) for seal in SEALED}
    return {**plain, **sealed}


def _in_turn(progress: Progress, part: str, ways: dict[str, Way], rounds: int) -> Iterator[Sample]:
    """Each way once a round; the order shifts by one each round, the first round is not counted."""
    names = list(ways)
    task = progress.add_task(part, total=(rounds + 1) * len(names))
    for turn in range(rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            sample = ways[name]()
            progress.advance(task)
            if turn:
                yield {**sample, "part": part, "way": name, "round": turn}


def over_shaped_link(rounds: int, num_tokens: int) -> Iterator[Sample]:
    """Both processes as children, each in a namespace of its own."""
    with link_namespaces.shaped_link() as ends, tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "path.json"
        host = ends.receiving_host
        serving = link_namespaces.inside(ends.receiving, *serve_command(host, SHAPED_PORT))
        counts = ("--rounds", str(rounds), "--tokens", str(num_tokens))
        measuring = _isthmus("--peer", f"tcp://{host}:{SHAPED_PORT}", *counts, "--json", str(written))
        with _child(serving), _child(link_namespaces.inside(ends.sending, *measuring)) as process:
            if process.wait():
                raise EngineError(f"the measuring process in namespace {ends.sending} ended with {process.returncode}")
        yield from jsonlib.loads(written.read_text())["samples"]


def serve_command(host: str, port: int) -> list[str]:
    """The command of a process that serves one run."""
    return _isthmus("--serve", f"tcp://{host}:{port}")


def _isthmus(*options: str) -> list[str]:
    return [sys.executable, "-P", "-m", "isthmus", "measure", "link", *options]


@contextmanager
def _peer(endpoint: str) -> Iterator[Peer]:
    peer = Peer(endpoint)
    try:
        yield peer
        peer.leave()
    finally:
        peer.close()


@contextmanager
def _child(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that is gone afterwards; what it prints is dropped, what it logs as warnings is shown."""
    child = subprocess.Popen(  # noqa: S603 - our own command
        command,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"ISTHMUS_LOG": "warning"},
        start_new_session=True,
    )
    try:
        yield child
        with suppress(subprocess.TimeoutExpired):
            child.wait(END_S)
    finally:
        if child.poll() is None:
            # With what it has started itself.
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


@contextmanager
def _local_peer() -> Iterator[Peer]:
    """A serving process on loopback."""
    (port,) = free_ports(1)
    with _child(serve_command("127.0.0.1", port)), _peer(f"tcp://127.0.0.1:{port}") as peer:
        yield peer
