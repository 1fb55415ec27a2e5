"""A sink that checks what lands, a receiver that can be driven to an end, and a relay that damages what passes."""

import itertools
import secrets
import threading
import time
from collections import defaultdict

import msgspec
import numpy as np
import zmq

from tests.golden.examples import LANDING
from transfer.codecs import by_wire_id
from transfer.errors import CodecError, IsthmusError, ProtocolError
from transfer.frames import Element
from transfer.geometry import KVGeometry
from transfer.layout import frame_elements
from transfer.messages import Ticket
from transfer.receiver import KVReceiver

GEOMETRY = KVGeometry(
    model_fingerprint="0123456789abcdef",
    num_layers=3,
    num_kv_heads=2,
    head_dim_k=32,
    head_dim_v=32,
    rope_dims=32,
    rope_theta=10000.0,
    rope_scaling="none",
    sliding_window=0,
    vocab_size=256,
)
TOKEN_BYTES = 2 * frame_elements(GEOMETRY, 1, 1)
# Two layers of a chunk of 8 tokens: every chunk takes two frames.
FRAME_BYTES = 2 * 8 * TOKEN_BYTES
CHUNK_TOKENS = 8
# Long enough for a loaded machine, short enough for a test that has to wait for it.
PATIENCE_S = 20.0


def make_ticket(endpoint, *, codec="raw", credit_chunks=2, deadline_ms=10_000):
    return Ticket(
        request_id="r-1",
        ticket=secrets.token_hex(16),
        kv_endpoint=endpoint,
        codec=codec,
        landing=LANDING,
        chunk_tokens=CHUNK_TOKENS,
        credit_chunks=credit_chunks,
        deadline_ms=deadline_ms,
    )


def make_chunks(num_tokens, seed=0):
    """(start_token, elements [num_layers, elements of one layer]) of a prompt, bf16 bit patterns around 1."""
    rng = np.random.default_rng(seed)
    chunks = []
    for start in range(0, num_tokens, CHUNK_TOKENS):
        tokens = min(CHUNK_TOKENS, num_tokens - start)
        shape = (GEOMETRY.num_layers, frame_elements(GEOMETRY, tokens, 1))
        chunks.append((start, rng.integers(0x3F00, 0x4000, shape, dtype=np.uint16)))
    return chunks


def send(sender, ticket, chunks):
    """Hand a whole prompt to the sender; False if it refused a chunk."""
    sender.open(ticket)
    accepted = all(sender.submit(ticket.ticket, start, elements, Element.BF16, 1) for start, elements in chunks)
    sender.finish(ticket.ticket, sum(elements.shape[1] for _, elements in chunks) * 2 // TOKEN_BYTES)
    return accepted


class Landed:
    """A sink: keeps elements by start token, grants a credit for each complete chunk."""

    def __init__(self, receiver, ticket, *, grants=True):
        self.receiver, self.ticket, self.grants = receiver, ticket, grants
        self.rows = defaultdict(dict)
        self.report = None
        self.error = None

    @property
    def over(self):
        return self.report is not None or self.error is not None

    @property
    def complete_chunks(self):
        return sum(len(rows) == GEOMETRY.num_layers for rows in self.rows.values())

    def chunk(self, start):
        return np.stack([self.rows[start][layer] for layer in range(GEOMETRY.num_layers)])

    def data(self, header, payload):
        assert not self.over
        elements = frame_elements(GEOMETRY, header.num_tokens, 1)
        if header.num_tokens > CHUNK_TOKENS or header.first_layer + header.num_layers > GEOMETRY.num_layers:
            raise ProtocolError("frame reaches out of its chunk")
        outs = [np.empty(elements, np.uint16) for _ in range(header.num_layers)]
        codec = by_wire_id(header.codec)
        if codec.name != self.ticket.codec:
            raise CodecError(f"frame uses {codec.name}, the ticket says {self.ticket.codec}")
        tokens = range(header.start_token, header.start_token + header.num_tokens)
        codec.decode(payload, header.element, Element.BF16, outs, tokens)
        for layer, out in enumerate(outs, header.first_layer):
            assert layer not in self.rows[header.start_token]
            self.rows[header.start_token][layer] = out
        if self.grants and len(self.rows[header.start_token]) == GEOMETRY.num_layers:
            self.receiver.grant(self.ticket.ticket, self.complete_chunks + self.ticket.credit_chunks)

    def end(self, report):
        assert not self.over
        if report.num_tokens * TOKEN_BYTES * GEOMETRY.num_layers != 2 * sum(
            row.size for rows in self.rows.values() for row in rows.values()
        ):
            raise ProtocolError("frames do not cover the prompt")
        self.report = report

    def fail(self, error):
        assert not self.over
        assert isinstance(error, IsthmusError)
        assert str(error)
        self.error = error


class Worker:
    """A receiver on loopback with the loop that a decode worker's I/O thread would run."""

    def __init__(self, port=0, geometry=GEOMETRY):
        self.context = zmq.Context()
        self.receiver = KVReceiver(self.context, f"tcp://127.0.0.1:{port or '*'}", geometry, FRAME_BYTES)
        self.endpoint = f"tcp://127.0.0.1:{self.receiver.port}"

    def expect(self, ticket, **options):
        landed = Landed(self.receiver, ticket, **options)
        self.receiver.expect(ticket.ticket, landed)
        return landed

    def run_until(self, condition, patience_s=PATIENCE_S):
        """Take messages until the condition holds; False if it never does."""
        give_up_ns = time.monotonic_ns() + int(patience_s * 1e9)
        while not condition():
            if time.monotonic_ns() > give_up_ns:
                return False
            if self.receiver.socket.poll(10):
                self.receiver.turn()
        return True

    def close(self):
        self.receiver.close()
        self.context.term()


class Fault(msgspec.Struct, frozen=True):
    """What happens to message number ``index`` of one direction ("up": to the worker)."""

    direction: str
    index: int
    action: str  # drop, duplicate, swap (with the next one), flip, truncate
    bit: int = 0


class Relay:
    """Stands between senders and one worker, each sender on its own connection, and works the faults in."""

    def __init__(self, worker_endpoint, faults):
        self.worker_endpoint = worker_endpoint
        self.faults = {(fault.direction, fault.index): fault for fault in faults}
        self.context = zmq.Context()
        self.front = self.context.socket(zmq.ROUTER)
        self.front.linger = 0
        self.endpoint = f"tcp://127.0.0.1:{self.front.bind_to_random_port('tcp://127.0.0.1')}"
        self.backs = {}
        self.counts = {"up": itertools.count(), "down": itertools.count()}
        self.held = []
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        poller = zmq.Poller()
        poller.register(self.front, zmq.POLLIN)
        while not self.stopping.is_set():
            ready = dict(poller.poll(20))
            if not ready:
                self.release()
            if self.front in ready:
                identity, *parts = self.front.recv_multipart()
                if identity not in self.backs:
                    back = self.backs[identity] = self.context.socket(zmq.DEALER)
                    back.linger = 0
                    back.connect(self.worker_endpoint)
                    poller.register(back, zmq.POLLIN)
                self.forward("up", parts, self.backs[identity].send_multipart)
            for identity, back in self.backs.items():
                if back in ready:
                    parts = back.recv_multipart()
                    self.forward(
                        "down", parts, lambda parts, identity=identity: self.front.send_multipart([identity, *parts])
                    )
        for socket in (self.front, *self.backs.values()):
            socket.close()

    def forward(self, direction, parts, deliver):
        fault = self.faults.get((direction, next(self.counts[direction])))
        match fault.action if fault else "pass":
            case "pass":
                deliver(parts)
            case "duplicate":
                deliver(parts)
                deliver(parts)
            case "flip":
                deliver(flipped(parts, fault.bit))
            case "truncate":
                deliver([*parts[:-1], parts[-1][: fault.bit % max(1, len(parts[-1]))]])
            case "swap":
                self.held.append((deliver, parts))
                return
        self.release()

    def release(self):
        for deliver, parts in self.held:
            deliver(parts)
        self.held.clear()

    def close(self):
        self.stopping.set()
        self.thread.join()
        self.context.term()


def flipped(parts, bit):
    """The parts with one bit turned, counted over all of them."""
    whole = bytearray(b"".join(parts))
    bit %= 8 * len(whole)
    whole[bit // 8] ^= 1 << bit % 8
    edges = [0, *itertools.accumulate(map(len, parts))]
    return [bytes(whole[a:b]) for a, b in itertools.pairwise(edges)]
