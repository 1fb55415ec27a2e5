"""Filling a gap: the prompt for OpenAI's ``suffix``, out of the tokens that a model has for it.

Which tokens those are is found in its vocabulary, as llama.cpp finds them (``src/llama-vocab.cpp``). All families want
the text before the gap first ("prefix, suffix, middle"; Bavarian et al., "Efficient Training of Language Models to Fill
in the Middle", 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

# What stands before the text that precedes the gap, before the one that follows it, and where the answer begins.
_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),  # Code Llama
    ("<PRE>", "<SUF>", "<MID>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),  # DeepSeek
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
)
# By these models say that the gap is filled, beside the ends that they have for everything.
_ENDS = (
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<|file_separator|>",
    "<fim_pad>",
    "<file_sep>",
    "\u2581<EOT>",
    "<EOT>",
    "<|endoftext|>",
)
# Stands before a text that is not to be tokenized as one that begins; no tokenizer joins it with what follows.
_BEFORE = "\u263a"


class Infill(NamedTuple):
    """Token ids of one vocabulary: the three marks, and what ends an answer."""

    prefix: int
    suffix: int
    middle: int
    ends: tuple[int, ...]

    def prompt(self, before: list[int], after: list[int]) -> list[int]:
        """Asks for what stands between ``before`` and ``after``; a BOS is the caller's."""
        return [self.prefix, *before, self.suffix, *after, self.middle]


def find(vocabulary: Mapping[str, int]) -> Infill | None:
    """How the model of ``vocabulary`` (token to id) is asked to fill a gap; None if it has no tokens for that."""
    for marks in _MARKS:
        if all(mark in vocabulary for mark in marks):
            prefix, suffix, middle = (vocabulary[mark] for mark in marks)
            ends = tuple(vocabulary[end] for end in _ENDS if end in vocabulary and end not in marks)
            return Infill(prefix, suffix, middle, ends)
    return None


def continued(text: str, tokenize: Callable[[str], list[int]], *, byte_level: bool) -> list[int]:
    """Token ids of ``text`` where it does not begin anything: without the space that SentencePiece puts in front."""
    if byte_level:
        return tokenize(text)
    return tokenize(_BEFORE + text)[len(tokenize(_BEFORE)) :]
