"""Speculative decoding: guessed tokens are computed beside the last one, and kept as far as they come true.

The sampler of the request runs over the rows as if they had come one by one (Leviathan et al., "Fast Inference from
Transformers via Speculative Decoding", ICML 2023, where the draft is certain of itself): a token that it picks is the
answer's whether it was guessed or not, so that penalties, grammars, seeds and log probabilities hold. A right guess
saves a step, a wrong one costs a row.

How many are guessed is decided for every step: as many as make the expected number of tokens over the measured cost of
the batch largest.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from cpu_decode.draft import DraftModel
from cpu_decode.lookup import Lookup
from cpu_decode.sequence import Sequence as Decoding
from cpu_decode.step_costs import StepCosts

# Larger batches are dearer than any guess is worth.
TIMED_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Guessing must promise this much, for what it promises is an estimate.
WORTHWHILE = 1.1
# Of sequences for which nothing was guessed, no step may take longer than this many times its length.
MOST_SLOWDOWN = 1.75
FIRST_CHANCE = 0.5
# Share of the newest guess in the chance that the next one is right.
WEIGHT = 0.15
# Asking a draft model costs time: chances that nobody tests rise until somebody does.
RISE = 0.01


class Guessing(NamedTuple):
    """How to guess: ``auto`` where it is measured to pay, at most ``most_tokens`` for a sequence.

    By ``model``, or else from the text so far. ``row_ns``: how long batches take by their number of rows, if that is
    known from a profile.
    """

    mode: Literal["auto", "off", "always"] = "off"
    most_tokens: int = 15
    row_ns: Mapping[int, float] = {}
    model: DraftModel | None = None

    def rows(self, most_rows: int) -> tuple[int, ...]:
        """The sizes of batches to be timed, up to ``most_rows``."""
        return tuple(rows for rows in TIMED_ROWS if rows <= most_rows)


NO_GUESSING = Guessing()


class Chance:
    """How likely a guess for one sequence is right, if the one before it was."""

    def __init__(self) -> None:
        self.value = FIRST_CHANCE

    def observe(self, guess: Sequence[int], came: Sequence[int]) -> None:
        """Compare ``guess`` with the tokens that ``came``, as far as either goes and to the first that differs."""
        for guessed, token in zip(guess, came, strict=False):
            if guessed != token:
                self.value -= WEIGHT * self.value
                return
            self.value += WEIGHT * (1 - self.value)

    def rest(self) -> None:
        """Note that nothing was guessed."""
        self.value = max(self.value, min(self.value + RISE, FIRST_CHANCE))


class Speculation:
    """Guesses for the sequences of a step, and how they fared. Engine thread only."""

    def __init__(self, guessing: Guessing, costs: StepCosts) -> None:
        self._always = guessing.mode == "always"
        self._most_tokens = guessing.most_tokens
        self._costs = costs
        self._model = guessing.model
        self._guesses: list[list[int]] = []
        self._chances: dict[Decoding, Chance] = {}
        self._lookups: dict[Decoding, Lookup] = {}
        # Whether right guesses would pay, by the number of sequences; forgotten when a cost is learnt.
        self._pays: dict[int, bool] = {}

    def drafts(self, decoding: Sequence[Decoding], room: int) -> list[list[int]]:
        """Tokens to compute behind the last one of each sequence, at most ``room`` in all."""
        self.guess_nothing(decoding)
        if not (self._always or self._may_pay(len(decoding))):
            return self._guesses
        limits = [min(self._most_tokens, sequence.left_tokens - 1) for sequence in decoding]
        if self._model is None:
            self._guesses = [self._look_up(*each) for each in zip(decoding, limits, strict=True)]
            limits = [len(guess) for guess in self._guesses]
        counts = self._counts(decoding, limits)
        while sum(counts) > room:
            counts[counts.index(max(counts))] -= 1
        if self._model is not None:
            self._guesses = self._model.guess(decoding, counts)
        return [guess[:count] for guess, count in zip(self._guesses, counts, strict=True)]

    def guess_nothing(self, decoding: Sequence[Decoding]) -> list[list[int]]:
        """In the place of :meth:`drafts`, for a step in which there is nothing to guess."""
        self._guesses = [[] for _ in decoding]
        return self._guesses

    def observe(self, decoding: Sequence[Decoding], came: Sequence[Sequence[int]], drafted: int, step_ns: int) -> None:
        """Learn from a step without prefill: the tokens that ``came`` for each sequence, and how long it took.

        What was guessed counts even where it was not computed.
        """
        for sequence, guess, tokens in zip(decoding, self._guesses, came, strict=True):
            chance = self._chances.get(sequence)
            if chance is None:
                # Nobody has asked for it yet, or the sequence has ended with this step.
                continue
            if guess:
                chance.observe(guess, tokens)
            elif self._model is not None:
                chance.rest()
        self._costs.observe(len(decoding), len(decoding) + drafted, step_ns)
        if drafted:
            self._pays.pop(len(decoding), None)

    def forget(self, sequence: Decoding) -> None:
        """A sequence has ended."""
        self._chances.pop(sequence, None)
        self._lookups.pop(sequence, None)
        if self._model is not None:
            self._model.forget(sequence.seq_id)

    def _look_up(self, sequence: Decoding, limit: int) -> list[int]:
        if limit < 1:
            return []
        lookup = self._lookups.get(sequence)
        if lookup is None:
            lookup = self._lookups[sequence] = Lookup(len(sequence.tokens) + sequence.left_tokens)
        return lookup.guess(sequence.tokens, limit)

    def _counts(self, decoding: Sequence[Decoding], limits: list[int]) -> list[int]:
        if self._always:
            return [max(limit, 0) for limit in limits]
        chances = [self._chance(sequence).value for sequence in decoding]
        most_cost = MOST_SLOWDOWN if len(decoding) > 1 else math.inf
        return allocate(chances, limits, lambda guessed: self._cost(len(decoding), guessed), most_cost)

    def _cost(self, sequences: int, guessed: int) -> float:
        # A draft model guesses for all sequences at once, token by token.
        more_ns = self._model.step_ns * math.ceil(guessed / sequences) if self._model else 0.0
        return self._costs.ratio(sequences, sequences + guessed, more_ns)

    def _may_pay(self, sequences: int) -> bool:
        """Whether guesses that are all right would be worth their cost."""
        if sequences not in self._pays:
            limits = [self._most_tokens] * sequences
            sure = allocate([1.0] * sequences, limits, lambda guessed: self._cost(sequences, guessed))
            self._pays[sequences] = any(sure)
        return self._pays[sequences]

    def _chance(self, sequence: Decoding) -> Chance:
        return self._chances.setdefault(sequence, Chance())


def allocate(
    chances: Sequence[float], limits: Sequence[int], cost: Callable[[int], float], most_cost: float = float("inf")
) -> list[int]:
    """How many tokens to guess for each sequence, at most ``limits``, so that tokens over time are most.

    ``chances`` are the likelihoods that a guess is right if all before it were; ``cost(guessed)`` is the duration of a
    step with so many guesses in all, over one without. All zero where no number promises ``WORTHWHILE`` times as much
    as guessing nothing, at a cost of at most ``most_cost``.
    """
    counts = [0] * len(chances)
    expected = float(len(chances))
    best, chosen = WORTHWHILE * expected, list(counts)
    # The likeliest guess next; a sequence's first is its likeliest.
    gains = [(-chance, at) for at, chance in enumerate(chances) if limits[at] > 0]
    heapq.heapify(gains)
    for guessed in range(1, sum(limits) + 1):
        gain, at = heapq.heappop(gains)
        counts[at] += 1
        expected -= gain
        if counts[at] < limits[at]:
            heapq.heappush(gains, (gain * chances[at], at))
        price = cost(guessed)
        if price <= most_cost and expected / price > best:
            best, chosen = expected / price, list(counts)
    return chosen
