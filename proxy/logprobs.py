"""Log probabilities in OpenAI's two shapes.

Shapes: https://platform.openai.com/docs/api-reference/chat/object and
https://platform.openai.com/docs/api-reference/completions/object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from proxy.vocabulary import Vocabulary
from transfer.messages import TokenLogprob

MAX_TOP = 20
_LEAST = -9999.0  # what OpenAI writes for minus infinity, which JSON lacks


def chat(logprobs: Sequence[TokenLogprob], vocabulary: Vocabulary) -> dict[str, Any]:
    """``logprobs`` of a chat choice or a chunk of it."""
    content = [
        _chat_token(entry.token, entry.logprob, vocabulary)
        | {"top_logprobs": [_chat_token(token, logprob, vocabulary) for token, logprob in entry.top]}
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def completion(logprobs: Sequence[TokenLogprob], vocabulary: Vocabulary, offset: int) -> dict[str, Any]:
    """``logprobs`` of a completion choice or a chunk of it, whose first token begins at character ``offset``.

    The token itself is among its ``top_logprobs`` even if it is not one of the likeliest.
    """
    tokens = [_name(entry.token, vocabulary) for entry in logprobs]
    offsets = []
    for entry in logprobs:
        offsets.append(offset)
        offset += _characters(entry, vocabulary)
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
        "top_logprobs": [_top(entry, vocabulary) for entry in logprobs],
        "text_offset": offsets,
    }


def width(logprobs: Sequence[TokenLogprob], vocabulary: Vocabulary) -> int:
    """How many characters :func:`completion` moves its offset on."""
    return sum(_characters(entry, vocabulary) for entry in logprobs)


def mean(logprobs: Sequence[TokenLogprob]) -> float:
    """Log probability per token, by which ``best_of`` ranks; an empty answer comes last."""
    return sum(entry.logprob for entry in logprobs) / len(logprobs) if logprobs else -math.inf


def _characters(entry: TokenLogprob, vocabulary: Vocabulary) -> int:
    """Characters that begin in the token: every byte of UTF-8 that continues none."""
    return sum(byte & 0xC0 != 0x80 for byte in vocabulary.piece(entry.token))


def _chat_token(token: int, logprob: float, vocabulary: Vocabulary) -> dict[str, Any]:
    piece = vocabulary.piece(token)
    return {"token": piece.decode(errors="replace"), "logprob": max(logprob, _LEAST), "bytes": list(piece)}


def _top(entry: TokenLogprob, vocabulary: Vocabulary) -> dict[str, float] | None:
    if math.isnan(entry.logprob):
        return None
    ranked = dict(entry.top) | {entry.token: entry.logprob}
    return {_name(token, vocabulary): max(logprob, _LEAST) for token, logprob in ranked.items()}


def _finite(logprob: float) -> float | None:
    return None if math.isnan(logprob) else max(logprob, _LEAST)


def _name(token: int, vocabulary: Vocabulary) -> str:
    """The token's text or, where that is no whole character, its bytes as OpenAI writes them."""
    piece = vocabulary.piece(token)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
