"""What a request waits for KV after its prefill is done, under a prefill of a given rate.

The producer stands for vLLM's connector (``gpu_prefill/export.py``) without a model: the tokens of a step get one layer
after the other, evenly, and layers are handed over in groups when vLLM's hook of the last of a group comes. Gathering
from paged blocks is not in it.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from measurements.link_sender import Peer, Sample, submit, transfer
from measurements.link_synthetic import GEOMETRY, TOKEN_BYTES, Chunk, chunks
from transfer.config import Link, Prefill
from transfer.layout import layers_per_frame, layers_together
from transfer.messages import Ticket
from transfer.seal import SealName
from transfer.sender import KVSender

# The share of a layer's work that is done when vLLM's ``save_kv_layer`` comes, which is right after attention: in
# Llama-3.1-8B, for a token behind 7,168 others, 25 million multiply-adds of the QKV projections and 59 of attention of
# 277 with the output projection and the MLP.
AT_HOOK = 0.3


class Prompt(NamedTuple):
    """A prefill: ``num_tokens`` at ``tokens_per_s`` in steps of ``step_tokens``, sent in chunks of ``chunk_tokens``."""

    num_tokens: int = 8192
    # An RTX 4070 Super's with Llama-3.1-8B.
    tokens_per_s: float = 4000.0
    step_tokens: int = Prefill().max_step_tokens
    # About what a worker picks for such a model, so that no injection takes 5 ms.
    chunk_tokens: int = 256

    @property
    def prefill_s(self) -> float:
        """How long the prefill takes."""
        return self.num_tokens / self.tokens_per_s

    @property
    def credit_chunks(self) -> int:
        """Landing buffers for as many tokens as the shipped ``[link]`` allows, as the decode worker counts them."""
        return Link().credit_chunks * Link().chunk_tokens // self.chunk_tokens


class Prefilling:
    """Prefills of ``prompt``, one after the other, whose KV goes to ``peer``."""

    def __init__(self, peer: Peer, prompt: Prompt) -> None:
        self._peer = peer
        self._prompt = prompt
        parts = chunks(prompt.num_tokens, prompt.chunk_tokens)
        self._steps = [
            [part for part in parts if start <= part[0].start < start + prompt.step_tokens]
            for start in range(0, prompt.num_tokens, prompt.step_tokens)
        ]

    def exposed(
        self, codec: str, seal: SealName, *, overlap: bool = True, late: bool = False, fresh: bool = False
    ) -> Sample:
        """One prefill and its transfer; ``seconds`` counts from when the last layer of the last token is computed.

        ``late`` hands a layer over when all of it is computed, MLP included. Without ``overlap`` nothing is handed over
        before the end; with ``fresh`` the landing buffers are new.
        """
        prompt = self._prompt
        handed_over = (1.0 if late else AT_HOOK) if overlap else None

        def paced(sender: KVSender, ticket: Ticket) -> int:
            due_ns = time.monotonic_ns()
            for step in self._steps:
                due_ns = self._compute(sender, ticket, step, due_ns, handed_over)
            for tokens, elements in () if overlap else (part for step in self._steps for part in step):
                submit(sender, ticket, tokens, 0, elements)
            return due_ns

        sample = transfer(
            self._peer, codec, seal, prompt.num_tokens, prompt.chunk_tokens, prompt.credit_chunks, paced, fresh=fresh
        )
        return sample | {"prefill_s": prompt.prefill_s, "fraction": sample["seconds"] / prompt.prefill_s}

    def _compute(
        self, sender: KVSender, ticket: Ticket, step: list[Chunk], began_ns: int, handed_over: float | None
    ) -> int:
        """Spend one step's time; returns when the last layer was computed, in ns.

        A layer is handed over when this share of its work is done, none if it is None.
        """
        prompt = self._prompt
        step_tokens = step[-1][0].stop - step[0][0].start
        layer_ns = step_tokens / prompt.tokens_per_s / GEOMETRY.num_layers * 1e9
        most_layers = layers_per_frame(GEOMETRY, min(prompt.chunk_tokens, step_tokens), Link().frame_mib << 20)
        sent = 0
        for layer in range(1, GEOMETRY.num_layers + 1):
            if handed_over is None:
                break
            _sleep_until(began_ns + int((layer - 1 + handed_over) * layer_ns))
            if layer == sent + layers_together(GEOMETRY.num_layers - sent, most_layers):
                for tokens, elements in step:
                    submit(sender, ticket, tokens, sent, elements[sent:layer])
                sent = layer
        ended_ns = began_ns + int(GEOMETRY.num_layers * layer_ns)
        _sleep_until(ended_ns)
        return ended_ns


def _sleep_until(due_ns: int) -> None:
    time.sleep(max(0, due_ns - time.monotonic_ns()) / 1e9)


def lone_frame(peer: Peer, codec: str, seal: SealName) -> Sample:
    """A prompt as long as one frame holds in all layers: what the last frame of any prompt takes at least."""
    num_tokens = (Link().frame_mib << 20) // TOKEN_BYTES
    ((tokens, elements),) = chunks(num_tokens, num_tokens)

    def at_once(sender: KVSender, ticket: Ticket) -> int:
        began_ns = time.monotonic_ns()
        submit(sender, ticket, tokens, 0, elements)
        return began_ns

    return transfer(peer, codec, seal, num_tokens, num_tokens, 1, at_once)
