"""The measuring process of ``isthmus measure link``: sends to the serving one by every way, and times it.

One clock times everything: it starts when the first block is handed over, and stops when the serving process has
answered that all has landed. One way back over the link is in every figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import zmq

from measurements import iperf
from measurements.link_orders import (
    BARE_HEADER,
    PATIENCE_S,
    VERSION,
    Await,
    Done,
    Expecting,
    Greet,
    Greeted,
    Leave,
    Listening,
    Message,
    Receive,
    ReceiveBare,
    Refused,
    ServeIperf,
    decode_answer,
    encode,
)
from measurements.link_synthetic import GEOMETRY, TOKEN_BYTES, Chunk, frames
from transfer import codecs
from transfer.config import Link
from transfer.errors import EngineError, LinkError, ProtocolError
from transfer.frames import Element, checksum
from transfer.keys import ClientKeys
from transfer.messages import Ticket
from transfer.seal import KEY_BYTES, NAMES, Opener, Sealer, SealName
from transfer.sender import KVSender

Sample = dict[str, Any]
A = TypeVar("A", Greeted, Expecting, Listening, Done)

GREET_PATIENCE_S = 60.0
SEND_HIGH_WATER_MARK = 4


class Peer:
    """The serving process at ``endpoint`` (``tcp://HOST:PORT``), and the sockets that lead to it."""

    def __init__(self, endpoint: str) -> None:
        self.host = urlsplit(endpoint).hostname or ""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._orders = self._context.socket(zmq.REQ)
        self._orders.linger = 0
        self._orders.connect(endpoint)
        self._bare = self._context.socket(zmq.PUSH)
        self._bare.sndhwm = SEND_HIGH_WATER_MARK
        self._bare_port = 0
        try:
            greeted = self.ask(Greet(), Greeted, GREET_PATIENCE_S)
            if greeted.version != VERSION:
                raise ProtocolError(f"version of the orders is {VERSION} here, {greeted.version} there")
        except BaseException:
            self._close_sockets()
            raise
        self.has_iperf3 = greeted.has_iperf3 and iperf.is_installed()
        self.sender = KVSender(
            GEOMETRY,
            max_backlog_bytes=1 << 40,
            frame_bytes=Link().frame_mib << 20,
            keys=ClientKeys(greeted.public, greeted.secret, greeted.server),
        )

    def ask(self, order: Message, kind: type[A], patience_s: float = PATIENCE_S) -> A:
        """Give an order and return its answer; LinkError if there is none, EngineError if the order was refused."""
        self._orders.send(encode(order))
        if not self._orders.poll(int(patience_s * 1000) + 1000):
            raise LinkError(f"the serving process did not answer {type(order).__name__} within {patience_s:.0f} s")
        answer = decode_answer(self._orders.recv())
        if isinstance(answer, Refused):
            raise EngineError(f"the serving process refused {type(order).__name__}: {answer.reason}")
        if not isinstance(answer, kind):
            raise ProtocolError(f"{type(order).__name__} was answered with {type(answer).__name__}")
        return answer

    def bare(self, port: int) -> zmq.Socket[bytes]:
        """The PUSH socket, connected to ``port`` of the serving host."""
        if port != self._bare_port:
            self._bare.connect(f"tcp://{self.host}:{port}")
            self._bare_port = port
        return self._bare

    def leave(self) -> None:
        """Tell the serving process that the run is over."""
        self.ask(Leave(), Done)

    def close(self) -> None:
        """Close every socket."""
        self.sender.close()
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._orders.close()
        self._bare.close(linger=0)
        self._context.term()


def transfer(
    peer: Peer,
    codec: str,
    seal: SealName,
    num_tokens: int,
    chunk_tokens: int,
    credit_chunks: int,
    produce: Callable[[KVSender, Ticket], int],
    *,
    fresh: bool = False,
) -> Sample:
    """One transfer. ``produce`` hands every block to the sender and returns the instant from which time counts, in ns.

    ``seconds`` is from there to the answer that all has landed.
    """
    order = Receive(
        codec=codec,
        seal=seal,
        num_tokens=num_tokens,
        chunk_tokens=chunk_tokens,
        credit_chunks=credit_chunks,
        fresh=fresh,
    )
    ticket = peer.ask(order, Expecting).ticket
    cpu_began_ns = time.process_time_ns()
    peer.sender.open(ticket)
    began_ns = produce(peer.sender, ticket)
    peer.sender.finish(ticket.ticket, num_tokens)
    done = peer.ask(Await(), Done)
    ended_ns = time.monotonic_ns()
    return {
        "way": codec if seal == "none" else f"{codec} {seal}",
        "kv_bytes": num_tokens * TOKEN_BYTES,
        "seconds": (ended_ns - began_ns) / 1e9,
        "sender_cpu_s": (time.process_time_ns() - cpu_began_ns) / 1e9,
        "receiver_cpu_s": done.cpu_ns / 1e9,
        "encode_s": done.encode_ns / 1e9,
        "wire_s": done.wire_ns / 1e9,
        "decode_frame_s": done.decode_frame_ns / 1e9,
        "wire_bytes": done.kv_wire_bytes,
        "landing_bytes": done.landing_bytes,
        "grown_bytes": done.grown_bytes,
    }


def plane(
    peer: Peer, codec: str, seal: SealName, prompt: Sequence[Chunk], link: Link, *, fresh: bool = False
) -> Sample:
    """A whole prompt through the whole plane as fast as it goes."""

    def at_once(sender: KVSender, ticket: Ticket) -> int:
        began_ns = time.monotonic_ns()
        for tokens, elements in prompt:
            submit(sender, ticket, tokens, 0, elements)
        return began_ns

    num_tokens = prompt[-1][0].stop
    return transfer(peer, codec, seal, num_tokens, link.chunk_tokens, link.credit_chunks, at_once, fresh=fresh)


def sealed_plane(peer: Peer, seal: SealName, prompt: Sequence[Chunk], link: Link) -> Sample:
    """The same with codec ``raw`` and a seal; and what sealing and opening take alone, on one core, after it.

    ``seal_s`` and ``open_s`` are timed on the frames of the first chunk and scaled to the prompt.
    """
    sample = plane(peer, "raw", seal, prompt, link)
    parts = [part.reshape(-1).view(np.uint8).data for part in frames(list(prompt[:1]), link.frame_mib << 20)]
    sealer = Sealer(bytes(KEY_BYTES), NAMES[seal])
    opener = Opener(bytes(KEY_BYTES), NAMES[seal], max(map(len, parts)))
    began_ns = time.monotonic_ns()
    sealed = [sealer.seal(counter, BARE_HEADER, part) for counter, part in enumerate(parts)]
    sealed_ns = time.monotonic_ns()
    for counter, (payload, tag) in enumerate(sealed):
        opener.open(counter, BARE_HEADER, payload, tag)
    scale = sample["kv_bytes"] / sum(map(len, parts)) / 1e9
    return sample | {
        "seal_s": (sealed_ns - began_ns) * scale,
        "open_s": (time.monotonic_ns() - sealed_ns) * scale,
    }


def submit(sender: KVSender, ticket: Ticket, tokens: range, first_layer: int, elements: np.ndarray[Any, Any]) -> None:
    """Hand some layers of a chunk over; LinkError if the transfer has failed."""
    if not sender.submit(ticket.ticket, tokens, first_layer, elements, Element.BF16, 0):
        raise LinkError(f"transfer failed: {sender.take_failed().get(ticket.ticket, 'no reason given')}")


def bare(peer: Peer, prompt: list[Chunk], link: Link, *, copied: bool) -> Sample:
    """As many ZeroMQ messages of the same sizes as the plane makes of ``prompt`` with codec ``raw``, and no more."""
    parts = frames(prompt, link.frame_mib << 20)
    listening = peer.ask(ReceiveBare(messages=len(parts), copied=copied), Listening)
    socket = peer.bare(listening.port)
    cpu_began_ns, began_ns = time.process_time_ns(), time.monotonic_ns()
    for part in parts:
        socket.send_multipart([BARE_HEADER, part.view(np.uint8).data], copy=False)
    done = peer.ask(Await(), Done)
    return {
        "kv_bytes": sum(part.nbytes for part in parts),
        "seconds": (time.monotonic_ns() - began_ns) / 1e9,
        "sender_cpu_s": (time.process_time_ns() - cpu_began_ns) / 1e9,
        "receiver_cpu_s": done.cpu_ns / 1e9,
    }


def checked(prompt: list[Chunk], landed: list[Chunk], link: Link) -> Sample:
    """What raw KV costs beside ZeroMQ whoever moves it: XXH3 at both ends and one copy to where it lands, on one core.

    The receiving end's frame lies in the processor's caches, as when the kernel has just copied it. It lands in
    ``landed``, which is as large as ``prompt``.
    """
    parts, places = ([f.reshape(-1) for f in frames(blocks, link.frame_mib << 20)] for blocks in (prompt, landed))
    arrived = np.empty_like(max(parts, key=len))
    sender_ns = receiver_ns = 0
    for part, place in zip(parts, places, strict=True):
        began_ns = time.thread_time_ns()
        check = checksum(part.view(np.uint8).data)
        sender_ns += time.thread_time_ns() - began_ns
        frame = arrived[: part.size]
        np.copyto(frame, part)
        began_ns = time.thread_time_ns()
        if checksum(frame.view(np.uint8).data) != check:
            raise LinkError("a copy in memory differs from its original")
        codecs.by_name("raw").decode(frame.view(np.uint8).data, Element.BF16, Element.BF16, [place], range(0))
        receiver_ns += time.thread_time_ns() - began_ns
    return {
        "kv_bytes": sum(part.nbytes for part in parts),
        "seconds": (sender_ns + receiver_ns) / 1e9,
        "sender_cpu_s": sender_ns / 1e9,
        "receiver_cpu_s": receiver_ns / 1e9,
    }


def iperf3(peer: Peer, num_bytes: int) -> Sample:
    """One TCP stream of ``num_bytes``, timed by iperf3 itself."""
    listening = peer.ask(ServeIperf(), Listening)
    stream = iperf.send(peer.host, listening.port, num_bytes)
    return {
        "kv_bytes": stream.num_bytes,
        "seconds": stream.seconds,
        "sender_cpu_s": stream.sender_cpu_s,
        "receiver_cpu_s": stream.receiver_cpu_s,
    }
