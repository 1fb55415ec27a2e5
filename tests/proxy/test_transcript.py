"""An answer that several nodes made reads as if one had made it, wherever the seams are."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from proxy.handoff import Job, Piece
from proxy.transcript import Transcript
from proxy.vocabulary import Vocabulary
from transfer.messages import Sampling
from transfer.text import TextStream

EOS = 0


@pytest.fixture(scope="module")
def vocabulary(hf_dir: Path) -> Vocabulary:
    return Vocabulary(AutoTokenizer.from_pretrained(hf_dir))


@pytest.fixture(scope="module")
def token_of(vocabulary: Vocabulary) -> dict[int, int]:
    """Token by byte."""
    return {vocabulary.piece(token)[0]: token for token in range(2, 258)}


def job(max_tokens: int, **sampling: object) -> Job:
    return Job("r", [1, 2], Sampling(max_tokens=max_tokens, **sampling), None, "auto", 1.0)


class Engine:
    """Says tokens as both engines do: text as soon as it is certain."""

    def __init__(self, vocabulary: Vocabulary, sampling: Sampling) -> None:
        self._vocabulary = vocabulary
        self._stream = TextStream(sampling.stop)
        self._min_tokens = sampling.min_tokens

    def say(self, token: int, *, last: bool) -> Piece:
        self._min_tokens -= 1
        text = self._stream.push(self._vocabulary.shown(token), may_stop=self._min_tokens < 0)
        if self._stream.stopped:
            return Piece(text, "stop", 0, (token,))
        if token == EOS:
            return Piece(text + self._stream.flush(), "stop", 0, (token,))
        return Piece(text + (self._stream.flush() if last else ""), "length" if last else None, 0, (token,))


def answered(vocabulary: Vocabulary, ids: list[int], seams: set[int], **sampling: object) -> tuple[str, str | None]:
    """The text that a client gets of ``ids``, where a new engine says each token whose number is in ``seams``."""
    whole = job(len(ids), **sampling)
    transcript, engine = Transcript(whole, vocabulary), Engine(vocabulary, whole.sampling)
    text = ""
    for number, token in enumerate(ids):
        if number in seams:
            rest = transcript.rest()
            assert rest is not None
            assert rest.prompt == whole.prompt + ids[:number]
            assert (rest.prior_output, rest.sampling.max_tokens) == (number, len(ids) - number)
            engine = Engine(vocabulary, rest.sampling)
        said = transcript.take(engine.say(token, last=number == len(ids) - 1))
        text += said.text
        if said.finish_reason:
            assert transcript.ended or not any(0 < seam <= number for seam in seams)
            return text, said.finish_reason
    return text, None


@settings(max_examples=300)
@given(
    text=st.text(alphabet="ab\u00e9\u20ac\U0001f600 ", max_size=12),
    stop=st.lists(st.text(alphabet="ab\u00e9\u20ac", min_size=1, max_size=3), max_size=2),
    broken=st.binary(max_size=2),
    ends=st.booleans(),
    min_tokens=st.integers(0, 4),
    seams=st.sets(st.integers(0, 40), max_size=4),
)
@example(text="aa", stop=["a", "aa"], broken=b"", ends=False, min_tokens=2, seams={1})
def test_a_seam_is_not_seen(vocabulary, token_of, text, stop, broken, ends, min_tokens, seams):
    ids = [token_of[byte] for byte in text.encode() + broken] + [EOS] * ends
    asked = {"stop": tuple(stop), "min_tokens": min_tokens}
    assert answered(vocabulary, ids, seams, **asked) == answered(vocabulary, ids, set(), **asked)


def test_before_a_seam_pieces_pass_as_they_are(vocabulary):
    piece = Piece("no token spells this", None, 0, (7,))
    assert Transcript(job(9), vocabulary).take(piece) is piece


def test_a_text_that_its_tokens_do_not_spell_cannot_go_on(vocabulary):
    transcript = Transcript(job(9), vocabulary)
    transcript.take(Piece("no token spells this", None, 0, (7,)))
    assert transcript.rest() is None


def test_several_choices_cannot_go_on_once_one_has_begun(vocabulary, token_of):
    several = job(9)._replace(choices=2)
    transcript = Transcript(several, vocabulary)
    assert transcript.rest() == several
    transcript.take(Piece("a", None, 1, (token_of[ord("a")],)))
    assert transcript.rest() is None


def test_what_is_left_to_sample(vocabulary, token_of):
    transcript = Transcript(job(9, min_tokens=3, seed=7), vocabulary)
    transcript.take(Piece("ab", None, 0, (token_of[ord("a")], token_of[ord("b")])))
    rest = transcript.rest()
    assert (rest.sampling.max_tokens, rest.sampling.min_tokens, rest.sampling.seed) == (7, 1, 5)
    assert transcript.left_tokens == 7
    for byte in b"cdefg":
        transcript.take(Piece("", None, 0, (token_of[byte],)))
    assert transcript.rest().sampling.min_tokens == 0


def test_a_stop_token_is_not_shown(vocabulary, token_of):
    x = token_of[ord("x")]
    transcript = Transcript(job(9, stop_token_ids=(x,)), vocabulary)
    transcript.take(Piece("a", None, 0, (token_of[ord("a")],)))
    assert transcript.rest()
    assert transcript.take(Piece("", "stop", 0, (token_of[ord("b")], x))).text == "b"
