"""Output that must match a JSON schema, a grammar or a regular expression: which tokens may come next.

llguidance does it, as llama.cpp itself can be built to. llama.cpp's own grammars end the process on some inputs (an
exception or an assertion that ctypes cannot catch), and their cost has no bound; llguidance's work a token has one, and
its mask over a whole vocabulary takes a fraction of a millisecond.
"""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark

from cpu_decode.llama import Model
from transfer.errors import RequestError
from transfer.messages import Reserve

MAX_SCHEMA_BYTES = 64 << 10
# What every rule of GBNF has, and no Lark.
_GBNF_RULE = "::="
# Reading a GBNF grammar takes time that grows with the square of its rules.
MAX_GRAMMAR_BYTES = 16 << 10
# As much as people write, or a model could pad its answer with spaces until it runs out of tokens.
_JSON_OPTIONS = {"whitespace_pattern": r"( |\n[ \t]{0,20})?"}
_SILENT = 0


class Grammar:
    """What one sequence may still say. Owned by the engine's thread once the sequence is."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, param: str) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._param = param

    @property
    def complete(self) -> bool:
        """Whether everything has been said: nothing but the end may follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may come next, bool ``[vocab_size]``; end tokens only where the output may end.

        Raises :class:`RequestError` where the grammar takes more work than a token may.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        """Note the next token. Raises :class:`RequestError` if it may not come next."""
        self._matcher.consume_token(token)
        self._check()

    def copy(self) -> Grammar:
        """The same state, for another sequence."""
        return Grammar(self._matcher.deep_copy(), self._vocab_size, self._param)

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n<state>")[0]
            raise RequestError(f"{self._param} cannot be followed further: {reason}", self._param)


class _Vocabulary:
    """A model's vocabulary as :class:`TokenizerWrapper` wants it."""

    def __init__(self, model: Model) -> None:
        self._tokenize = model.tokenize
        self.tokens = [model.piece(token) for token in range(model.vocab_size)]
        # Tokens without text are the control tokens.
        self.special_token_ids = [token for token, piece in enumerate(self.tokens) if not piece]
        self.eos_token_id = model.end_tokens[0]
        self.bos_token_id = None

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenize(text)


class Grammars:
    """Reads grammars for one model's vocabulary; building it takes about a second for 50,000 tokens."""

    def __init__(self, model: Model) -> None:
        self._vocab_size = model.vocab_size
        vocabulary = TokenizerWrapper(_Vocabulary(model))
        self._tokenizer = LLTokenizer(vocabulary, n_vocab=model.vocab_size, eos_token=model.end_tokens)

    def read(self, reserve: Reserve) -> Grammar | None:
        """What ``reserve`` constrains output to, if anything, from behind its prior output on.

        Raises :class:`RequestError`, which names the field and the reason.
        """
        sampling = reserve.sampling
        if not sampling.constrained:
            return None
        if sum(map(bool, (sampling.json_schema, sampling.grammar, sampling.regex))) > 1:
            raise RequestError("only one of response_format, grammar and regex can constrain the output", "grammar")
        if sampling.json_schema:
            grammar = self._match(_from_schema(sampling.json_schema), "response_format")
        elif sampling.regex:
            grammar = self._match(_from_regex(sampling.regex), "structured_outputs")
        else:
            grammar = self._match(_from_text(sampling.grammar), "grammar")
        for token in reserve.prompt[len(reserve.prompt) - reserve.prior_output :]:
            grammar.accept(token)
        return grammar

    def _match(self, source: str, param: str) -> Grammar:
        matcher = LLMatcher(self._tokenizer, source, log_level=_SILENT)
        if matcher.is_error():
            raise RequestError(f"{param} cannot be used: {matcher.get_error()}", param)
        return Grammar(matcher, self._vocab_size, param)


def _from_schema(schema: str) -> str:
    param = "response_format"
    _limit(schema, MAX_SCHEMA_BYTES, param)
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{param} has a schema that is not JSON: {error}", param) from None
    if parsed is True:
        parsed = {}
    if not isinstance(parsed, dict):
        raise RequestError(f"{param} needs a schema that is a JSON object", param)
    # In place of what the client may have put there.
    return LLMatcher.grammar_from_json_schema({**parsed, "x-guidance": _JSON_OPTIONS})


def _from_regex(regex: str) -> str:
    _limit(regex, MAX_GRAMMAR_BYTES, "structured_outputs")
    return LLMatcher.grammar_from_regex(regex)


def _from_text(text: str) -> str:
    param = "grammar"
    _limit(text, MAX_GRAMMAR_BYTES, param)
    try:
        return LLMatcher.grammar_from_lark(gbnf_to_lark(text) if _GBNF_RULE in text else text)
    except Exception as error:  # noqa: BLE001 - it raises this very class
        raise RequestError(f"{param} cannot be read: {error}", param) from None


def _limit(text: str, max_bytes: int, param: str) -> None:
    if len(text.encode()) > max_bytes:
        raise RequestError(f"{param} is longer than {max_bytes >> 10} KiB; make it smaller", param)
