"""What one step computes: a row for every sequence that decodes, guesses behind it, and pieces of local prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from cpu_decode import calibration
from cpu_decode.budget import PrefillBudget
from cpu_decode.calibration import Speed
from cpu_decode.llama import Batch, Context
from cpu_decode.sequence import Sequence as Decoding
from cpu_decode.speculate import Guessing, Speculation
from cpu_decode.step_costs import StepCosts
from cpu_decode.step_meter import Step, StepMeter
from transfer.errors import CapacityError


class Part(NamedTuple):
    """What one sequence has in a batch: ``num_tokens`` of its tokens, and ``draft`` behind them.

    ``row`` is that of the last of its tokens; None if the sequence's last token is not among them.
    """

    sequence: Decoding
    num_tokens: int
    row: int | None
    draft: list[int]


class Steps:
    """Fills and computes batches of up to ``batch_tokens``, and learns from how long they take. Engine thread only."""

    def __init__(self, context: Context, batch_tokens: int, guessing: Guessing) -> None:
        self._context = context
        self._batch = Batch(batch_tokens)
        self._budget = PrefillBudget(batch_tokens)
        self._guessing = guessing
        self._speculation: Speculation | None = None
        self._decoding: list[Decoding] = []
        self._began_ns = 0
        self.meter = StepMeter()

    def calibrate(self) -> Speed:
        """Time what batches cost; cells are left as they were."""
        guessing = self._guessing
        timed = guessing.mode == "auto" and not guessing.row_ns
        speed = calibration.measure(self._context, self._batch, guessing.rows(self._batch.capacity) if timed else ())
        self._budget.calibrate(speed.prefill_tokens_per_s)
        if guessing.mode != "off":
            if guessing.model is not None:
                guessing.model.calibrate()
            self._speculation = Speculation(guessing, StepCosts(guessing.row_ns or speed.row_ns))
        return speed

    def compute(self, running: Sequence[Decoding]) -> list[Part]:
        """Compute the next tokens of ``running``; returns what was in the batch.

        Raises :class:`CapacityError` if there are too few free cells, and then has changed nothing.
        """
        self._began_ns = time.monotonic_ns()
        self._decoding = [sequence for sequence in running if sequence.missing_tokens == 1]
        if not self._context.unified:
            # Or llama.cpp would compute them in several goes.
            self._decoding.sort(key=lambda sequence: sequence.seq_id)
        prefilling = [sequence for sequence in running if sequence.missing_tokens > 1]
        drafts = self._drafts(prefilling)
        parts = self._fill(prefilling, drafts)
        try:
            self._context.decode(self._batch)
        except CapacityError:
            if not any(drafts):
                raise
            parts = self._fill(prefilling, [[] for _ in drafts])
            self._context.decode(self._batch)
        for part in parts:
            part.sequence.num_cached += part.num_tokens
        return parts

    def learn(self, parts: Sequence[Part], came: dict[Decoding, list[int]]) -> None:
        """Note how long the step took that computed ``parts``, and the tokens that ``came`` of it."""
        step_ns = time.monotonic_ns() - self._began_ns
        decoding = self._decoding
        drafted = sum(len(part.draft) for part in parts)
        prefilled = self._batch.size - len(decoding) - drafted
        if not drafted:
            self._budget.observe(len(decoding), prefilled, step_ns)
        if not decoding:
            return
        tokens = [came.get(sequence, []) for sequence in decoding]
        if self._speculation is not None and not prefilled:
            self._speculation.observe(decoding, tokens, drafted, step_ns)
        self.meter.add(
            Step(
                time.monotonic_ns(),
                step_ns,
                len(decoding),
                sum(sequence.num_cached for sequence in decoding),
                sum(map(len, tokens)),
                plain=not (drafted or prefilled),
            )
        )

    def forget(self, sequence: Decoding) -> None:
        """A sequence has ended."""
        if self._speculation is not None:
            self._speculation.forget(sequence)

    def _drafts(self, prefilling: Sequence[Decoding]) -> list[list[int]]:
        """Guesses for each sequence that decodes: none beside a prefill, which fills the step as it is."""
        if self._speculation is None:
            return [[] for _ in self._decoding]
        if prefilling or not all(sequence.forked for sequence in self._decoding):
            return self._speculation.guess_nothing(self._decoding)
        return self._speculation.drafts(self._decoding, self._batch.capacity - len(self._decoding))

    def _fill(self, prefilling: Sequence[Decoding], drafts: list[list[int]]) -> list[Part]:
        self._batch.clear()
        parts = []
        for sequence, draft in zip(self._decoding, drafts, strict=True):
            tokens = [sequence.tokens[-1], *draft]
            row = self._batch.add(sequence.seq_id, sequence.num_cached, tokens, want_logits=len(tokens))
            parts.append(Part(sequence, 1, row - len(draft), draft))
        decoding = len(self._decoding)
        budget = min(self._batch.capacity - decoding, self._budget.tokens(decoding))
        for sequence in prefilling:
            count = min(sequence.missing_tokens, budget)
            if count == 0:
                break
            budget -= count
            last = count == sequence.missing_tokens
            tokens = sequence.tokens[sequence.num_cached : sequence.num_cached + count]
            row = self._batch.add(sequence.seq_id, sequence.num_cached, tokens, want_logits=last)
            parts.append(Part(sequence, count, row if last else None, []))
        return parts
