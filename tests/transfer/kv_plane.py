"""A sink that checks what lands, a receiver that can be driven to an end, and a relay that damages what passes."""

import secrets
import time
from collections import defaultdict

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
    """(tokens, elements [num_layers, elements of one layer]) of a prompt, bf16 bit patterns around 1."""
    rng = np.random.default_rng(seed)
    chunks = []
    for start in range(0, num_tokens, CHUNK_TOKENS):
        tokens = range(start, min(start + CHUNK_TOKENS, num_tokens))
        shape = (GEOMETRY.num_layers, frame_elements(GEOMETRY, len(tokens), 1))
        chunks.append((tokens, rng.integers(0x3F00, 0x4000, shape, dtype=np.uint16)))
    return chunks


def send(sender, ticket, chunks, *, layers=GEOMETRY.num_layers, step_chunks=1):
    """Hand a prompt to the sender in steps of some chunks, some layers at a time; False if it refused a slab."""
    sender.open(ticket)
    accepted = [
        sender.submit(ticket.ticket, tokens, first, elements[first : first + layers].copy(), Element.BF16, 1)
        for step in range(0, len(chunks), step_chunks)
        for first in range(0, GEOMETRY.num_layers, layers)
        for tokens, elements in chunks[step : step + step_chunks]
    ]
    sender.finish(ticket.ticket, chunks[-1][0].stop)
    return all(accepted)


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

    def data(self, header, payload, share, received_ns):  # noqa: ARG002 - all come from one sender
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

    def __init__(self, ports=(0, 0), geometry=GEOMETRY, frame_bytes=FRAME_BYTES, **options):
        self.context = zmq.Context()
        self.receiver = KVReceiver(
            self.context,
            "127.0.0.1",
            geometry,
            frame_bytes=frame_bytes,
            control_port=ports[0],
            frames_port=ports[1],
            **options,
        )
        self.ports = self.receiver.port, self.receiver.frames_port
        self.endpoint = f"tcp://127.0.0.1:{self.receiver.port}"
        self.poller = zmq.Poller()
        for socket in (self.receiver.control, self.receiver.frames):
            self.poller.register(socket, zmq.POLLIN)

    def expect(self, ticket, **options):
        landed = Landed(self.receiver, ticket, **options)
        self.receiver.expect(ticket.ticket, landed, ticket.credit_chunks)
        return landed

    def run_until(self, condition, patience_s=PATIENCE_S):
        """Take messages until the condition holds; False if it never does."""
        give_up_ns = time.monotonic_ns() + int(patience_s * 1e9)
        while not condition():
            if time.monotonic_ns() > give_up_ns:
                return False
            if self.poller.poll(10):
                self.receiver.turn()
        return True

    def close(self):
        self.receiver.close()
        self.context.term()
