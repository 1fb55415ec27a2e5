"""What a worker refuses before llama.cpp sees it, by the name of the field."""

from __future__ import annotations

import pytest

from cpu_decode.asked import check
from transfer.errors import RequestError
from transfer.messages import Reserve, Sampling

VOCAB_SIZE = 100


def reserve(prompt: list[int]) -> Reserve:
    return Reserve(request_id="r", prompt=prompt, sampling=Sampling(max_tokens=1), source="kv")


@pytest.mark.parametrize("prompt", [[0], [99], list(range(100))])
def test_every_token_of_the_vocabulary_may_be_asked_for(prompt: list[int]) -> None:
    check(reserve(prompt), VOCAB_SIZE, 4)


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [([], "at least 1 token"), ([100], r"outside 0\.\.99"), ([5, -1], r"outside 0\.\.99"), ([2**31], "outside")],
)
def test_a_prompt_of_nothing_or_of_unknown_tokens_is_refused(prompt: list[int], complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        check(reserve(prompt), VOCAB_SIZE, 4)
