"""A real decode worker in a process of its own, and what a benchmark does with it: land KV, start, take tokens."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import psutil
import zmq

from isthmus.children import die_with_parent
from transfer.config import Cluster, Decode, Link, Pair, Proxy, dump
from transfer.errors import EngineError, LinkError, from_wire
from transfer.frames import Element
from transfer.geometry import KVGeometry
from transfer.layout import Elements, frame_elements, layers_per_frame
from transfer.messages import (
    Abort,
    Failure,
    FromWorker,
    Hello,
    Message,
    Ping,
    Reserve,
    Sampling,
    Start,
    Status,
    Ticket,
    Tokens,
    Welcome,
    decode_from_worker,
    encode,
)
from transfer.sender import KVSender

START_S = 300.0
ANSWER_S = 600.0
POLL_MS = 100
# A worker drops the requests of whoever is silent for ten seconds.
PING_S = 2.0
LINK = Link(seal="none")

T = TypeVar("T", Welcome, Ticket, Status)


class Stream:
    """One request's tokens as they came: at ``times_ns[i]``, ``counts[i]`` of them; complete when ``last`` is set."""

    def __init__(self, ticket: Ticket, num_tokens: int) -> None:
        self.ticket = ticket
        self.num_tokens = num_tokens
        self.times_ns: list[int] = []
        self.counts: list[int] = []
        self.last: Tokens | None = None


class LiveWorker:
    """Speaks to one worker as the proxy and a prefill node do. Not thread-safe."""

    def __init__(self, process: psutil.Process, port: int) -> None:
        self.process = process
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        # Not by polling, which takes longer: the processors are those that the worker computes on.
        self._socket.rcvtimeo = POLL_MS
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        self._streams: dict[str, Stream] = {}
        self._ids = itertools.count()
        self._said_ns = 0
        self._unasked = 0
        # Prompts never repeat, so that no prefix is reused.
        self._random = np.random.default_rng(time.monotonic_ns())
        self._send(Hello())
        self.geometry = self._wait_for(Welcome, START_S).geometry
        self._sender = KVSender(self.geometry, max_backlog_bytes=1 << 40, frame_bytes=LINK.frame_mib << 20)
        self._blocks: dict[int, Elements] = {}

    def close(self) -> None:
        """Hang up."""
        self._sender.close()
        self._socket.close()
        self._context.term()

    def reserve(self, num_tokens: int, max_tokens: int, source: Literal["kv", "local"]) -> Stream:
        """Promise cells for a random prompt of ``num_tokens``; greedy, to the last of ``max_tokens``."""
        prompt = self._random.integers(0, self.geometry.vocab_size, num_tokens).tolist()
        return self.reserve_prompt(prompt, max_tokens, source)

    def reserve_prompt(self, prompt: list[int], max_tokens: int, source: Literal["kv", "local"] = "local") -> Stream:
        """The same for a prompt of the caller's."""
        request_id = f"measure-{next(self._ids)}"
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        reserve = Reserve(
            request_id=request_id,
            prompt=prompt,
            sampling=sampling,
            source=source,
            codec="raw",
            deadline_ms=int(ANSWER_S * 1000),
        )
        self._send(reserve)
        stream = Stream(self._wait_for(Ticket, ANSWER_S), len(prompt))
        self._streams[request_id] = stream
        if source == "kv":
            self._sender.open(stream.ticket)
        return stream

    def land(self, stream: Stream, *, hold_back: bool = False) -> None:
        """Send synthetic KV for the whole prompt; with ``hold_back`` all but the last layer of the last chunk."""
        chunks = list(self._chunks(stream))
        for tokens, first, elements in chunks[:-1] if hold_back else chunks:
            self._sender.submit(stream.ticket.ticket, tokens, first, elements, Element.BF16, 0)
        if not hold_back:
            self._sender.finish(stream.ticket.ticket, stream.num_tokens)

    def land_rest(self, stream: Stream) -> None:
        """Send what was held back."""
        tokens, first, elements = list(self._chunks(stream))[-1]
        self._sender.submit(stream.ticket.ticket, tokens, first, elements, Element.BF16, 0)
        self._sender.finish(stream.ticket.ticket, stream.num_tokens)

    def await_landing(self) -> None:
        """Wait until the worker has all KV that was sent; raises :class:`LinkError` if it does not come to that."""
        deadline_ns = time.monotonic_ns() + int(ANSWER_S * 1e9)
        while self._sender.backlog_bytes:
            if time.monotonic_ns() > deadline_ns:
                raise LinkError("KV has not landed in the decode worker that is measured")
            self.status()
            time.sleep(0.02)

    def start(self, stream: Stream, first_token: int | None = None) -> None:
        """Let it join the batch."""
        self._send(Start(request_id=stream.ticket.request_id, first_token=first_token))

    def abort(self, stream: Stream) -> None:
        """Give its cells back."""
        del self._streams[stream.ticket.request_id]
        self._send(Abort(request_id=stream.ticket.request_id))

    def status(self) -> Status:
        """How the worker is."""
        self._send(Ping())
        return self._wait_for(Status, ANSWER_S)

    def idle(self) -> None:
        """Wait until the worker holds no request."""
        while self.status().reserved_sequences:
            time.sleep(0.05)

    def take_until(self, streams: Iterable[Stream], num_tokens: int | None = None) -> None:
        """Take tokens until each stream has ``num_tokens`` of them, or is complete."""
        waited = list(streams)
        deadline_ns = time.monotonic_ns() + int(ANSWER_S * 1e9)
        while any(s.last is None and (num_tokens is None or sum(s.counts) < num_tokens) for s in waited):
            self._take(self._receive(deadline_ns))

    def take_for(self, seconds: float) -> None:
        """Take tokens for so long."""
        deadline_ns = time.monotonic_ns() + int(seconds * 1e9)
        while (left_ms := (deadline_ns - time.monotonic_ns()) // 1_000_000) > 0:
            if self._socket.poll(left_ms):
                self._take(self._receive(deadline_ns + 1_000_000_000))

    def _chunks(self, stream: Stream) -> Iterator[tuple[range, int, Elements]]:
        """Token range, first layer and elements of each submission; the last chunk's last layer comes alone."""
        ticket, layers = stream.ticket, self.geometry.num_layers
        for start in range(0, stream.num_tokens, ticket.chunk_tokens):
            tokens = range(start, min(start + ticket.chunk_tokens, stream.num_tokens))
            group = layers_per_frame(self.geometry, len(tokens), LINK.frame_mib << 20)
            if len(tokens) not in self._blocks:
                self._blocks[len(tokens)] = synthetic_kv(self.geometry, len(tokens))
            block = self._blocks[len(tokens)]
            for first in range(0, layers - 1, group):
                yield tokens, first, block[first : min(first + group, layers - 1)]
            yield tokens, layers - 1, block[layers - 1 :]

    def _send(self, message: Message) -> None:
        self._said_ns = time.monotonic_ns()
        self._socket.send(encode(message))

    def _receive(self, deadline_ns: int) -> FromWorker:
        """The next message; meanwhile the worker hears that somebody listens, and its answers to that are dropped."""
        while True:
            if time.monotonic_ns() - self._said_ns > PING_S * 1e9:
                self._send(Ping())
                self._unasked += 1
            with suppress(zmq.Again):
                message = decode_from_worker(self._socket.recv())
                if not self._unasked or not isinstance(message, Status):
                    return message
                self._unasked -= 1
                continue
            if not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE:
                raise EngineError("the decode worker that is measured has died")
            if time.monotonic_ns() > deadline_ns:
                raise LinkError("the decode worker that is measured has fallen silent")

    def _wait_for(self, kind: type[T], seconds: float) -> T:
        deadline_ns = time.monotonic_ns() + int(seconds * 1e9)
        while not isinstance(message := self._receive(deadline_ns), kind):
            self._take(message)
        return message

    def _take(self, message: FromWorker) -> None:
        if isinstance(message, Failure):
            raise from_wire(message.code, message.message)
        if isinstance(message, Tokens) and (stream := self._streams.get(message.request_id)):
            stream.times_ns.append(time.monotonic_ns())
            stream.counts.append(len(message.token_ids))
            if message.finish_reason:
                stream.last = message
                del self._streams[message.request_id]


def synthetic_kv(geometry: KVGeometry, num_tokens: int) -> Elements:
    """Normally distributed bf16 KV, uint16 ``[num_layers, elements of one layer]``."""
    values = np.random.default_rng(0).standard_normal(frame_elements(geometry, num_tokens, 1)).astype(np.float32)
    layer = (values.view(np.uint32) >> 16).astype(np.uint16)
    return np.ascontiguousarray(np.broadcast_to(layer, (geometry.num_layers, layer.size)))


@contextmanager
def live_worker(gguf: Path, decode: Decode) -> Iterator[LiveWorker]:
    """``isthmus decode`` over ``gguf``, ready, for the body. The cluster's keys and seals are left out.

    Raises :class:`EngineError` with what it said last if it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="isthmus-measure-") as temporary:
        folder = Path(temporary)
        pair = Pair(name=gguf.stem, hf_dir=temporary, gguf=str(gguf.resolve()))
        (folder / "isthmus.toml").write_bytes(
            dump(Cluster(pair=pair, decode=decode, link=LINK, proxy=Proxy(registry_port=0)))
        )
        command = [sys.executable, "-P", "-m", "isthmus", "decode", "--config", str(folder / "isthmus.toml")]
        with (folder / "log").open("w+") as said:
            process = subprocess.Popen(  # noqa: S603 ours
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                # Not ours: the worker's own setting is what counts.
                env={key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"},
                preexec_fn=die_with_parent,
            )
            try:
                worker = LiveWorker(psutil.Process(process.pid), decode.control_port)
                try:
                    worker.status()
                    yield worker
                finally:
                    worker.close()
            except EngineError as error:
                said.seek(0)
                raise EngineError(f"{error}; its last words:\n{said.read()[-2000:]}") from None
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(START_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
