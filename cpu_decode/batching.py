"""Continuous batching: who is in the next batch, what came of the last one, and whose cells hold what between them.

Every sequence is its tokens so far and how many of them have KV in cells. A sequence that misses one decodes, with
guesses behind it where that pays; one that misses more prefills (a local prompt). Both share one batch. Between steps,
KV is copied in and out in the order of asking, a few milliseconds of it at a time. Where cells run out, the newest
sequence waits in RAM.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import structlog

from cpu_decode import answers
from cpu_decode.copies import Copies
from cpu_decode.events import (
    ChoiceFreed,
    Copied,
    Ended,
    Event,
    Injected,
    Preempted,
    Prompted,
    Released,
    Restored,
    Settled,
)
from cpu_decode.landing import LandingReport
from cpu_decode.llama import Context
from cpu_decode.preempt import Parked
from cpu_decode.prefix import Block
from cpu_decode.reuse import Plan
from cpu_decode.sequence import Sequence
from cpu_decode.speculate import Guessing
from cpu_decode.state import ChunkState, StateBlob, cut
from cpu_decode.steps import Part, Steps
from cpu_decode.window_blocks import WindowBlocks
from transfer.errors import CapacityError, EngineError, IsthmusError, LinkError, RequestError
from transfer.messages import Failure, FinishReason, Tokens

log = structlog.get_logger()

# Shorter prefills, or ones that shared their batches, say little about the machine's rate.
MIN_OBSERVED_TOKENS = 64


class Batching:
    """The requests of one context. Engine thread only, but the numbers without an underscore may be read by any.

    ``emit`` is called for every event; after :class:`Released` nothing more is emitted about a request. ``answer`` is
    called with a client and what it is to hear.
    """

    def __init__(
        self,
        context: Context,
        *,
        batch_tokens: int,
        emit: Callable[[Event], None],
        answer: Callable[[bytes, Tokens | Failure], None],
        guessing: Guessing,
        windows: WindowBlocks | None = None,
    ) -> None:
        self._context = context
        self._emit = emit
        self._answer = answer
        self._steps = Steps(context, batch_tokens, guessing)
        self.meter = self._steps.meter
        self._copies = Copies(context, windows)
        self._parked = Parked(context)
        self.drafted_tokens = self.accepted_tokens = 0
        self._sequences: dict[str, Sequence] = {}
        self._ended: dict[str, Sequence] = {}
        self._running: list[Sequence] = []
        self._came: tuple[list[Part], dict[Sequence, list[int]]] | None = None
        self.running_sequences = self.preempted_sequences = 0
        self.prefill_tokens_per_s = 0.0
        self.prefill_basis = ""
        self.inject_tokens_per_s = 0.0

    def land(self, request_id: str, chunk: ChunkState) -> None:
        """Inject ``chunk`` in its turn; :class:`Injected` gives the buffer back, whatever happens."""
        self._copies.then(lambda: self._land(request_id, chunk))

    def complete(self, request_id: str, report: LandingReport) -> None:
        """All chunks of a request have been handed over."""
        self._copies.then(lambda: self._complete(request_id, report))

    def compute_the_rest(self, request_id: str) -> None:
        """Prefill what is missing of a prompt, behind the chunks that were handed over."""
        self._copies.then(lambda: self._compute_the_rest(request_id))

    def between_steps(self) -> None:
        """Copy KV for a few milliseconds, end what has expired, and bring back who waits in RAM if there is room."""
        self._copies.run()
        self._expire()
        self._resume()

    def fail_all(self, error: EngineError) -> None:
        """End every request with a Failure."""
        for request_id in list(self._sequences):
            self.fail(request_id, error)

    @property
    def gathered_bytes(self) -> int:
        """Memory of KV that waits to be put into cells whole."""
        return self._copies.gathered_bytes

    @property
    def busy(self) -> bool:
        """Whether there is something to compute or to copy."""
        return bool(self._running or self._copies)

    def admit(self, sequence: Sequence, plan: Plan) -> None:
        """Take a request whose cells are promised, with what it reuses; :class:`Restored` gives ``plan`` back."""
        self._sequences[sequence.request_id] = sequence
        if plan.donor is not None:
            if parked := self._parked.blob(plan.donor):
                self._copies.then(partial(self._inject, sequence, cut(parked, range(plan.shared_tokens))))
            else:
                self._context.share(plan.donor, sequence.seq_id, plan.shared_tokens)
                sequence.num_cached = plan.shared_tokens
        for block, tokens in plan.pieces:
            self._copies.then(partial(self._restore, sequence, block, tokens))
        if plan.num_tokens:
            self._copies.then(lambda: self._restored(sequence, plan))

    def _restore(self, sequence: Sequence, block: Block, tokens: range) -> None:
        if self._sequences.get(sequence.request_id) is not sequence:
            return
        if not block.saved:
            self.fail(sequence.request_id, EngineError("the KV that this prompt was to reuse could not be kept"))
            return
        blob = StateBlob(block.buffer, block.num_bytes, block.start_token, len(block.tokens))
        self._inject(sequence, blob if len(tokens) == len(block.tokens) else cut(blob, tokens))

    def _restored(self, sequence: Sequence, plan: Plan) -> None:
        if self._sequences.get(sequence.request_id) is sequence:
            if sequence.restored_tokens:
                sequence.restore_ns += time.monotonic_ns() - sequence.admitted_ns
            self._join(sequence)
        self._emit(Restored(sequence.request_id, plan))

    def copy(self, request_id: str, blocks: list[Block]) -> None:
        """Copy the KV of a prompted request into those ``blocks`` that are not saved; :class:`Copied` says when."""
        sequence = self._sequences.get(request_id) or self._ended.get(request_id)
        if sequence is not None:
            self._copies.keep(sequence, blocks)
        self._copies.then(lambda: self._emit(Copied(request_id, blocks)))

    def _land(self, request_id: str, chunk: ChunkState) -> None:
        if sequence := self._sequences.get(request_id):
            self._inject(sequence, chunk)
        self._emit(Injected(request_id, chunk))

    def _inject(self, sequence: Sequence, chunk: ChunkState | StateBlob) -> None:
        while self._sequences.get(sequence.request_id) is sequence:
            try:
                self._copies.inject(sequence, chunk)
                return
            except EngineError as error:
                # All that llama.cpp says is that it did not take it: for want of cells, most likely.
                if not self._preempt_newest():
                    self.fail(sequence.request_id, error)

    def _complete(self, request_id: str, report: LandingReport) -> None:
        if sequence := self._sequences.get(request_id):
            sequence.landing = report
            self._join(sequence)

    def _compute_the_rest(self, request_id: str) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.landing is None:
            sequence.local = True
            self._join(sequence)

    def begin(self, request_id: str, first_token: int | None, first_text_sent: bool, now_ns: int) -> None:
        """Start decoding when the KV is there, by a Start that came at ``now_ns``."""
        sequence = self._sequences.get(request_id)
        if sequence is not None and not sequence.started:
            for choice in sequence.choices:
                choice.start(first_token, first_text_sent=first_text_sent, now_ns=now_ns)
            self._join(sequence)

    def _join(self, sequence: Sequence) -> None:
        """Let a sequence into the batch once it is started and its KV is complete."""
        if sequence.complete and not self._settle(sequence):
            return
        if not sequence.ready or sequence.joined_ns:
            return
        sequence.joined_ns = time.monotonic_ns()
        sequence.alone = not self._running
        for other in self._running:
            other.alone = False
        if sequence.num_cached == len(sequence.tokens):
            # The last position's logits were left behind on the prefill node; compute them again.
            sequence.num_cached -= 1
            self._context.trim(sequence.seq_id, sequence.num_cached)
        sequence.joined_tokens = sequence.num_cached
        self._run_along(sequence)
        self._note_prompt(sequence)
        if sequence.first_token is not None:
            for choice in sequence.choices:
                self._say(choice, *answers.take(choice, self._context.model, sequence.first_token))

    def _settle(self, sequence: Sequence) -> bool:
        """Where cells take KV whole, they get what has gathered; False if they do not, and the request has failed."""
        try:
            if self._copies.settle(sequence) or sequence.landing is not None:
                self._emit(Settled(sequence.request_id))
        except EngineError as error:
            self.fail(sequence.request_id, error)
            return False
        return True

    def _run_along(self, sequence: Sequence) -> None:
        self._running.append(sequence)
        self.running_sequences = len(self._running)

    def _stand_aside(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
            self.running_sequences = len(self._running)

    def _note_prompt(self, sequence: Sequence) -> None:
        """Say so once the cells hold the prompt: from then on others may share them."""
        if not sequence.prompted and sequence.num_cached >= sequence.prompt_tokens:
            sequence.prompted = True
            self._emit(Prompted(sequence.request_id))

    def step(self) -> None:
        """Compute one batch over all that run, sample, and say what came; then :meth:`learn`.

        Raises :class:`EngineError` if there are too few cells and nobody can wait for some.
        """
        try:
            parts = self._steps.compute(self._running)
        except CapacityError as error:
            if not self._preempt_newest():
                raise EngineError(str(error)) from None
            return
        came: dict[Sequence, list[int]] = {}
        for sequence, *_ in parts:
            self._copies.follow(sequence)
        for sequence, _, row, draft in parts:
            if row is None:
                continue
            self._note_prompt(sequence)
            self._observe(sequence)
            if sequence.forked:
                came[sequence] = self._sample(sequence, row, draft)
            else:
                self._fork(sequence, row)
        self._came = parts, came

    def learn(self) -> None:
        """Note how long the last step took; when its tokens are on their way, for they are waited for."""
        if self._came is not None:
            self._steps.learn(*self._came)
            self._came = None

    def _fork(self, sequence: Sequence, row: int) -> None:
        """Sample the first token of every choice from the same row; they share the cells of what is before it."""
        sequence.forked = True
        for choice in sequence.choices:
            if choice.request_id not in self._sequences:
                return
            if choice is not sequence:
                self._context.share(sequence.seq_id, choice.seq_id, sequence.num_cached)
                choice.fork(sequence.num_cached)
                self._run_along(choice)
            self._sample(choice, row, [])

    def _sample(self, sequence: Sequence, row: int, draft: list[int]) -> list[int]:
        """Sample from ``row``, and from each row behind it as long as what was guessed came; returns the tokens."""
        accepted = sequence.accepted_tokens
        try:
            answer = answers.sample(sequence, self._context, row, draft)
        except RequestError as error:
            self.fail(sequence.request_id, error)
            return []
        self.drafted_tokens += len(draft)
        self.accepted_tokens += sequence.accepted_tokens - accepted
        if len(answer.tokens) <= len(draft):
            # Before others learn that the sequence has ended, or go on: cells hold what was guessed wrong.
            self._context.trim(sequence.seq_id, sequence.num_cached)
        if draft:
            self._copies.follow(sequence)
        self._say(sequence, answer.text, answer.finish_reason)
        return answer.tokens

    def _say(self, sequence: Sequence, text: str, finish_reason: FinishReason | None) -> None:
        """Send what there is to send, and end the choice if that was its last token."""
        if not (text or finish_reason):
            return
        sequence.finished = finish_reason is not None
        report = sequence.choices[0].report() if all(choice.finished for choice in sequence.choices) else None
        message = answers.message(sequence, text, finish_reason, report)
        if report is not None:
            # Before the last words: whoever hears them may send the next prompt, which is to find free cells.
            self._release(sequence.choices[0])
        elif sequence.finished:
            self._pause(sequence)
        self._answer(sequence.client, message)

    def _preempt_newest(self) -> bool:
        """Let the newest running sequence wait in RAM; False if there is none that can.

        Choices share cells, and the cells of requests with several are promised in full: they stay. The cells of a
        stream are of no use to others.
        """
        victims = [sequence for sequence in self._running if len(sequence.choices) == 1 and self._context.unified]
        if not victims:
            return False
        sequence = max(victims, key=lambda each: each.admitted_ns)
        log.info("request waits in RAM for cells", request_id=sequence.request_id, tokens=sequence.num_cached)
        self._stand_aside(sequence)
        self._parked.park(sequence)
        self.preempted_sequences = len(self._parked)
        sequence.prompted = False
        self._emit(Preempted(sequence.request_id))
        return True

    def _resume(self) -> None:
        """Let the oldest preempted sequence go on if there is room again."""
        if not self._parked:
            return
        with_cells = [s for s in (*self._sequences.values(), *self._ended.values()) if s not in self._parked]
        resident = [choice for sequence in with_cells for choice in sequence.choices if not choice.freed]
        sequence = self._parked.next(resident, len(self._running), self._context.num_cells)
        if sequence is not None and self._parked.bring_back(sequence):
            self.preempted_sequences = len(self._parked)
            self._run_along(sequence)
            self._note_prompt(sequence)

    def fail(self, request_id: str, error: IsthmusError) -> None:
        """End a request with a Failure."""
        if sequence := self._sequences.get(request_id):
            log.warning("request failed", request_id=request_id, reason=str(error))
            self._answer(sequence.client, Failure(code=error.code, message=str(error), request_id=request_id))
            self._release(sequence)

    def abort(self, request_id: str) -> None:
        """End a request silently."""
        if sequence := self._sequences.get(request_id):
            log.info("request aborted", request_id=request_id)
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """End a sequence; cells that others may be about to share or keep are left until :meth:`leave`."""
        del self._sequences[sequence.request_id]
        sequence.ended = True
        for choice in sequence.choices:
            self._pause(choice)
            choice.sampler.close()
        if sequence.num_cached > sequence.promised_tokens:
            # What nobody preempts, and is only kept for later, must fit beside what is promised to others.
            sequence.num_cached = sequence.promised_tokens
            self._context.trim(sequence.seq_id, sequence.num_cached)
        if sequence.prompted or sequence.preemptions:
            self._ended[sequence.request_id] = sequence
            self._emit(Ended(sequence.request_id, sequence.tokens[: sequence.num_cached]))
        else:
            self._copies.then(lambda: self._free(sequence))

    def _pause(self, choice: Sequence) -> None:
        """Take a choice out of the batch; the first one keeps the prompt's cells for the others."""
        self._stand_aside(choice)
        self._steps.forget(choice)
        if choice is not choice.choices[0] and not choice.freed:
            choice.freed = True
            self._context.trim(choice.seq_id, 0)
            self._emit(ChoiceFreed(choice.request_id, choice.choice))

    def leave(self, request_id: str, blocks: list[Block]) -> None:
        """Copy the KV of an ended request into those ``blocks`` that are not saved, then let go of it."""
        sequence = self._ended.pop(request_id)
        self._copies.keep(sequence, blocks)
        self._copies.then(lambda: self._free(sequence))

    def _free(self, sequence: Sequence) -> None:
        self._parked.drop(sequence)
        self._copies.forget(sequence)
        self.preempted_sequences = len(self._parked)
        self._context.trim(sequence.seq_id, 0)
        self._emit(Released(sequence.request_id))

    def _expire(self) -> None:
        now = time.monotonic_ns()
        for sequence in [s for s in self._sequences.values() if not s.joined_ns and s.deadline_ns < now]:
            what = "its KV" if sequence.started else "a start"
            self.fail(sequence.request_id, LinkError(f"reservation expired waiting for {what}"))

    def _observe(self, sequence: Sequence) -> None:
        """Learn the local prefill rate from a prompt that had the machine to itself."""
        first = sequence.completion_tokens == 0
        computed = len(sequence.tokens) - sequence.joined_tokens
        if first and sequence.local and sequence.alone and computed >= MIN_OBSERVED_TOKENS:
            seconds = (time.monotonic_ns() - sequence.joined_ns) / 1e9
            self.prefill_tokens_per_s = computed / seconds
            self.prefill_basis = f"last local prefill: {computed} tokens in {seconds:.2f} s"

    def calibrate(self) -> None:
        """Time prefill, injection and batches; cells are left as they were."""
        speed = self._steps.calibrate()
        self.prefill_tokens_per_s, self.prefill_basis = speed.prefill_tokens_per_s, speed.prefill_basis
        self.inject_tokens_per_s = speed.inject_tokens_per_s
