"""Guessing the next tokens from the text so far: answers repeat their prompts, and themselves.

Prompt lookup decoding (A. Saxena, "Prompt Lookup Decoding", 2023), a draft without a model: where the last tokens have
been seen before, what followed them then is the guess. REST (He et al., NAACL 2024) does the same with a corpus.
"""

from __future__ import annotations

import numpy as np

# A single token that has been seen before says nothing; a match of more tokens than these is no better.
LEAST_MATCH, MOST_MATCH = 2, 5


class Lookup:
    """The tokens of one sequence, to be searched; room for ``max_tokens`` of them."""

    def __init__(self, max_tokens: int) -> None:
        self._tokens = np.empty(max_tokens, np.int32)
        self._size = 0

    def guess(self, tokens: list[int], count: int) -> list[int]:
        """``count`` tokens that may follow ``tokens``, or none; ``tokens`` only ever grows from call to call."""
        self._tokens[self._size : len(tokens)] = tokens[self._size :]
        self._size = len(tokens)
        known = self._tokens[: self._size]
        ends = self._longest_match(known)
        if ends is None:
            return []
        # Behind the end of the text the guess goes on with itself: a loop is guessed as often as it fits.
        period = known.size - 1 - ends
        guess: list[int] = known[ends + 1 : ends + 1 + count].tolist()
        while len(guess) < count:
            guess.append(guess[-period])
        return guess

    @staticmethod
    def _longest_match(known: np.ndarray[tuple[int], np.dtype[np.int32]]) -> int | None:
        """Where the last tokens occurred before: the end of the latest of the longest matches."""
        if known.size <= LEAST_MATCH:
            return None
        ends = np.flatnonzero(known[:-1] == known[-1])
        found = None
        for length in range(2, MOST_MATCH + 1):
            if known.size < length:
                break
            ends = ends[ends >= length - 1]
            ends = ends[known[ends - length + 1] == known[-length]]
            if not ends.size:
                break
            if length >= LEAST_MATCH:
                found = int(ends[-1])
        return found
