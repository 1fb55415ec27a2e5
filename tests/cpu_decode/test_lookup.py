from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_decode.lookup import LEAST_MATCH, MOST_MATCH, Lookup


@pytest.mark.parametrize(
    ("tokens", "guess"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1]),
        # The latest of equally long matches, and a longer one before a later one.
        ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2]),
        ([9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2], [3, 8, 1]),
        # A loop goes on.
        ([7, 7, 7], [7, 7, 7]),
        ([1, 2, 1, 2], [1, 2, 1]),
        # One token that was there before is no match, nor are too few tokens.
        ([1, 2, 3, 1], []),
        ([1, 2], []),
        ([5], []),
    ],
)
def test_what_followed_the_last_tokens_before_is_the_guess(tokens: list[int], guess: list[int]) -> None:
    assert Lookup(20).guess(tokens, 3) == guess


def naive(tokens: list[int], count: int) -> list[int]:
    """The definition, without an index: the longest match up to ``MOST_MATCH``, the latest of those."""
    for length in range(min(MOST_MATCH, len(tokens) - 1), LEAST_MATCH - 1, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                text = list(tokens)
                for at in range(count):
                    text.append(text[start + length + at])
                return text[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6), st.data())
def test_guesses_are_those_of_the_definition_however_the_text_has_grown(
    tokens: list[int], count: int, data: st.DataObject
) -> None:
    lookup = Lookup(len(tokens))
    for size in sorted(data.draw(st.sets(st.integers(1, len(tokens)), max_size=3))):
        lookup.guess(tokens[:size], count)
    assert lookup.guess(tokens, count) == naive(tokens, count)
