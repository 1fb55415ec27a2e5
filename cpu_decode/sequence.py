"""One request in the decode engine, or one of its choices."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from cpu_decode.landing import LandingReport
from cpu_decode.llama import Model
from cpu_decode.sampling import Sampler
from transfer.messages import FinishReason, Reserve, TokenLogprob
from transfer.stages import DecodeReport
from transfer.text import TextStream


class Sequence:
    """Tokens so far, how many of them have KV in cells, and what the request has cost. The engine's; others may look.

    A request's first choice gets the prompt; ``others`` join it when it is computed, in cells that they share with it.
    """

    def __init__(
        self,
        reserve: Reserve,
        seq_id: int,
        sampler: Sampler,
        reused_tokens: int = 0,
        *,
        client: bytes = b"",
        choice: int = 0,
        others: tuple[Sequence, ...] = (),
        promised_tokens: int | None = None,
        queued_ns: int = 0,
    ) -> None:
        self.request_id = reserve.request_id
        # Who hears its tokens.
        self.client = client
        self.seq_id = seq_id
        self.choice = choice
        self.choices: tuple[Sequence, ...] = (self, *others)
        for other in others:
            other.choices = self.choices
        self.forked = not others
        # Its cells and its sequence id are others' from now on.
        self.freed = False
        # The request is over, its last word said; cells may still be copied.
        self.ended = False
        self.finished = False
        self.local = reserve.source == "local"
        self.sampling = reserve.sampling
        self.sampler = sampler
        self.text = TextStream(reserve.sampling.stop)
        self._ends = frozenset(reserve.sampling.stop_token_ids)
        self.prompt_tokens = len(reserve.prompt)
        self.tokens = list(reserve.prompt)
        self.num_cached = 0
        # The first blocks of their KV, where windows leave the cells to others (``window_blocks.py``).
        self.window_blocks: list[npt.NDArray[np.uint8]] = []
        # It may grow beyond its promised cells only where others can do without theirs.
        self.promised_tokens = promised_tokens or self.prompt_tokens + reserve.sampling.max_tokens
        # The first tokens, whose KV the worker has already; it may have to come back into cells.
        self.reused_tokens = reused_tokens
        # Those of them that had no cells, and how long it took to give them some.
        self.restored_tokens = self.restore_ns = 0
        self.prompted = False
        self.admitted_ns = time.monotonic_ns()
        self.deadline_ns = self.admitted_ns + reserve.deadline_ms * 1_000_000
        self._queued_ns = queued_ns
        self.preemptions = 0
        self.drafted_tokens = self.accepted_tokens = 0
        self.started = False
        self.first_token: int | None = None
        self.first_text_sent = False
        self.unsent_ids: list[int] = []
        self.unsent_logprobs: list[TokenLogprob] = []
        self.landing: LandingReport | None = None
        self.alone = True
        self.joined_tokens = 0
        self.inject_ns = 0
        self.started_ns = self.joined_ns = self.first_sampled_ns = 0

    @property
    def ready(self) -> bool:
        """Whether it may join the batch: Start has come and all KV that is to come."""
        return self.started and self.complete

    @property
    def complete(self) -> bool:
        """Whether all KV has come that is to come."""
        return self.num_cached >= self.reused_tokens if self.local else self.landing is not None

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV comes from elsewhere."""
        return self.reused_tokens if self.local else self.prompt_tokens

    @property
    def missing_tokens(self) -> int:
        """Tokens without KV."""
        return len(self.tokens) - self.num_cached

    @property
    def completion_tokens(self) -> int:
        """Tokens that were sampled, here or on the prefill node."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def left_tokens(self) -> int:
        """Tokens that may still be sampled."""
        return self.sampling.max_tokens - self.completion_tokens

    def start(self, first_token: int | None, *, first_text_sent: bool, now_ns: int) -> None:
        """Note Start, which came at ``now_ns``; a first token counts as this sequence's output."""
        self.started = True
        self.started_ns = now_ns
        self.first_token = first_token
        self.first_text_sent = first_text_sent
        if first_token is not None:
            self.sampler.accept(first_token)
            self.tokens.append(first_token)

    def take(self, token: int, model: Model) -> tuple[str, FinishReason | None]:
        """The text that ``token``, the newest in ``tokens``, completes, and why the sequence ends if it does."""
        self.unsent_ids.append(token)
        sampled_elsewhere = self.first_token is not None and self.completion_tokens == 1
        if not self.first_sampled_ns and not sampled_elsewhere:
            self.first_sampled_ns = time.monotonic_ns()
        if token in self._ends or (token in model.end_tokens and not self.sampling.ignore_eos):
            return self.text.flush(), "stop"
        # As in vLLM: what is sampled up to min_tokens completes no stop string.
        may_stop = self.completion_tokens > self.sampling.min_tokens
        text = self.text.push(model.piece(token), may_stop=may_stop)
        if self.text.stopped:
            return text, "stop"
        if self.sampler.complete:
            return text + self.text.flush(), "stop"
        if self.completion_tokens >= self.sampling.max_tokens:
            return text + self.text.flush(), "length"
        return text, None

    def fork(self, num_cached: int) -> None:
        """Note that the cells of all ``tokens`` are there, shared with the first choice."""
        self.num_cached = num_cached
        self.prompted = True

    def report(self) -> DecodeReport:
        """What the request has cost, now that it is finished; asked of the first choice."""
        now = time.monotonic_ns()
        first = self.first_sampled_ns or now
        costs = {}
        if self.landing is not None:
            sender = self.landing.sender
            costs = {
                "kv_raw_bytes": sender.kv_raw_bytes,
                "kv_wire_bytes": sender.kv_wire_bytes,
                "kv_resent_frames": sender.resent_frames,
                "gather_ns": sender.gather_ns,
                "encode_ns": sender.encode_ns,
                "d2h_ns": sender.d2h_ns,
                "wire_ns": self.landing.wire_ns,
                "decode_frame_ns": self.landing.decode_frame_ns,
                "transfer_exposed_ns": self.joined_ns - self.started_ns,
                "landing_tail_ns": self.joined_ns - max(self.landing.last_data_ns, self.started_ns),
            }
        return DecodeReport(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=sum(choice.completion_tokens for choice in self.choices),
            kv_reused_tokens=self.reused_tokens,
            inject_ns=self.inject_ns,
            local_prefill_ns=first - self.joined_ns if self.local else 0,
            first_decode_ns=0 if self.local else first - self.joined_ns,
            decode_ns=now - first,
            restored_tokens=self.restored_tokens,
            restore_ns=self.restore_ns,
            worker_queue_ns=self._queued_ns,
            preemptions=self.preemptions,
            drafted_tokens=sum(choice.drafted_tokens for choice in self.choices),
            accepted_tokens=sum(choice.accepted_tokens for choice in self.choices),
            **costs,
        )
