"""One llama.cpp sampler chain per sequence.

The order is vLLM's: forbidden tokens and biases, then penalties on the raw logits, then temperature, then min_p, top_k
and top_p on the scaled distribution (vLLM ``v1/sample/sampler.py``). What vLLM lacks stands
beside those where llama.cpp has it (``common/sampling.cpp``): DRY behind the penalties, typical_p before top_p, XTC at
the end. Repetition penalty and DRY look at prompt and output, presence and frequency at the output only; hence two
penalty samplers.

What changes with every token, grammars and min_tokens, is written into the logits before the chain reads them.
Temperature, min_p and top_p are ours where no top_k or typical_p comes between (``nucleus.py``): llama.cpp's are slow
over a whole vocabulary.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import llama_cpp
import numpy as np
import numpy.typing as npt

from cpu_decode.grammar import Grammar
from cpu_decode.llama import Context, Model
from cpu_decode.logprobs import token_logprob
from cpu_decode.nucleus import Nucleus, apply
from transfer.errors import RequestError
from transfer.messages import Reserve, Sampling, TokenLogprob

Logits = npt.NDArray[np.float32]

_RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED: llama.cpp draws one
_GREEDY_BELOW = 1e-5  # vLLM's _SAMPLING_EPS
# Takes out what has no probability at all: typical sampling would compute 0 * inf of it.
_IMPOSSIBLE = 1e-30


class Sampled(NamedTuple):
    """A token, and its log probability if the request wants those."""

    token: int
    logprob: TokenLogprob | None


class Sampler:
    """Picks the next token of one choice of a request; :meth:`close` frees it."""

    def __init__(self, model: Model, reserve: Reserve, choice: int = 0, grammar: Grammar | None = None) -> None:
        sampling, prompt = reserve.sampling, reserve.prompt
        self._num_top = sampling.logprobs
        self._min_tokens = sampling.min_tokens
        self._output_tokens = 0
        self._ends = np.array([*model.end_tokens, *sampling.stop_token_ids], np.intp)
        self._grammar = grammar.copy() if grammar else None
        output = prompt[len(prompt) - reserve.prior_output :]
        # The likeliest token whatever came before: nothing needs to be remembered, nor copied for llama.cpp.
        self._argmax = False
        # Temperature, min_p and top_p, where they are ours: between what is in ``_before`` and what is in the chain.
        self._nucleus: Nucleus | None = None
        self._before: object = None
        self._chain = _new_chain()
        bias = dict(sampling.logit_bias)
        # A grammar allows the end only where nothing else may follow, or where the model ends by itself.
        if sampling.ignore_eos and not grammar:
            bias.update(dict.fromkeys(model.end_tokens, -math.inf))
        # Added to the logits themselves: a chain would copy all of them for the sake of a few.
        self._biased = np.array(list(bias), np.intp)
        self._bias = np.array(list(bias.values()), np.float32)
        # Tokens that become less likely, if no others become likelier.
        self._lowered = frozenset(bias) if all(value <= 0 for value in bias.values()) else None
        self._add_penalties(model, sampling, prompt, output)
        if sampling.temperature < _GREEDY_BELOW:
            self._argmax = not llama_cpp.llama_sampler_chain_n(self._chain)
            self._add(llama_cpp.llama_sampler_init_greedy())
        else:
            seed = _RANDOM_SEED if sampling.seed is None else (sampling.seed + choice) % _RANDOM_SEED
            self._add_distribution(sampling, seed)

    @property
    def complete(self) -> bool:
        """Whether a grammar allows nothing but the end."""
        return self._grammar is not None and self._grammar.complete

    def sample(self, context: Context, row: int) -> Sampled:
        """Sample from batch row ``row`` and remember the token.

        Raises :class:`RequestError` if the request's constraints leave no token.
        """
        forbids = self._grammar is not None or self._output_tokens < self._min_tokens
        if not forbids and self._num_top is None:
            self._output_tokens += 1
            return Sampled(self._pick(context, row, context.live_logits(row)), None)
        logits = context.live_logits(row)
        # Other choices may sample from the same row.
        raw = logits.copy() if forbids else logits
        if forbids:
            logits[self._forbidden(logits.size)] = -np.inf
        token = self._pick(context, row, logits)
        self._output_tokens += 1
        if self._grammar:
            self._grammar.accept(token)
        if forbids:
            logits[:] = raw
        return Sampled(token, None if self._num_top is None else token_logprob(raw, token, self._num_top))

    def accept(self, token: int) -> None:
        """Remember a token that was sampled elsewhere, without a grammar."""
        self._output_tokens += 1
        for chain in self._chains:
            llama_cpp.llama_sampler_accept(chain, token)

    def close(self) -> None:
        """Free the chains and their samplers."""
        for chain in self._chains:
            llama_cpp.llama_sampler_free(chain)

    @property
    def _chains(self) -> tuple[object, ...]:
        return (self._chain,) if self._before is None else (self._before, self._chain)

    def _pick(self, context: Context, row: int, logits: Logits) -> int:
        if not self._biased.size:
            return self._choose(context, row, logits)
        if self._argmax and self._lowered is not None:
            likeliest = int(logits.argmax())
            if likeliest not in self._lowered:
                return likeliest
        kept = logits[self._biased]
        logits[self._biased] = kept + self._bias
        token = self._choose(context, row, logits)
        logits[self._biased] = kept
        return token

    def _choose(self, context: Context, row: int, logits: Logits) -> int:
        if self._argmax:
            return int(logits.argmax())
        if self._nucleus is None:
            return int(llama_cpp.llama_sampler_sample(self._chain, context.handle, row))
        if self._before is not None:
            candidates = context.candidates
            candidates["logit"] = logits
            apply(self._before, candidates)
            logits = candidates["logit"]
        token = self._nucleus.draw(context, logits, self._chain)
        for chain in self._chains:
            llama_cpp.llama_sampler_accept(chain, token)
        return token

    def _forbidden(self, vocab_size: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        forbidden = ~self._grammar.allowed() if self._grammar else np.zeros(vocab_size, np.bool_)
        if self._output_tokens < self._min_tokens:
            forbidden[self._ends] = True
        if forbidden.all():
            raise RequestError("the grammar ends before min_tokens have been sampled; ask for fewer", "min_tokens")
        return forbidden

    def _add(self, sampler: object) -> None:
        llama_cpp.llama_sampler_chain_add(self._chain, sampler)

    def _add_penalties(self, model: Model, sampling: Sampling, prompt: list[int], output: list[int]) -> None:
        window = len(prompt) + sampling.max_tokens
        if sampling.repetition_penalty != 1.0:
            repetition = sampling.repetition_penalty
            self._add_primed(
                llama_cpp.llama_sampler_init_penalties(model.vocab_size, window, repetition, 0.0, 0.0), prompt
            )
        if sampling.frequency_penalty or sampling.presence_penalty:
            frequency, presence = sampling.frequency_penalty, sampling.presence_penalty
            self._add_primed(
                llama_cpp.llama_sampler_init_penalties(model.vocab_size, window, 1.0, frequency, presence), output
            )
        if sampling.dry_multiplier:
            breakers = [breaker.encode() for breaker in sampling.dry_sequence_breakers]
            dry = llama_cpp.llama_sampler_init_dry(
                model.vocab,
                sampling.dry_multiplier,
                sampling.dry_base,
                sampling.dry_allowed_length,
                min(sampling.dry_penalty_last_n, window) if sampling.dry_penalty_last_n >= 0 else window,
                (ctypes.c_char_p * len(breakers))(*breakers),
                len(breakers),
            )
            self._add_primed(dry, prompt)

    def _add_primed(self, sampler: object, tokens: list[int]) -> None:
        for token in tokens:
            llama_cpp.llama_sampler_accept(sampler, token)
        self._add(sampler)

    def _add_distribution(self, sampling: Sampling, seed: int) -> None:
        whole = sampling.top_k <= 0 and sampling.typical_p >= 1
        # XTC looks for likely tokens, and must not take all unlikely ones together for one.
        if whole and (sampling.top_p < 1 or sampling.xtc_probability <= 0):
            self._nucleus = Nucleus(sampling.temperature, sampling.min_p, sampling.top_p)
            if llama_cpp.llama_sampler_chain_n(self._chain):
                self._before, self._chain = self._chain, _new_chain()
        else:
            self._add_selection(sampling)
        if sampling.xtc_probability > 0:
            self._add(llama_cpp.llama_sampler_init_xtc(sampling.xtc_probability, sampling.xtc_threshold, 1, seed))
        self._add(llama_cpp.llama_sampler_init_dist(seed))

    def _add_selection(self, sampling: Sampling) -> None:
        self._add(llama_cpp.llama_sampler_init_temp(sampling.temperature))
        if sampling.min_p > 0:
            self._add(llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1))
        if sampling.top_k > 0:
            self._add(llama_cpp.llama_sampler_init_top_k(sampling.top_k))
        if sampling.typical_p < 1:
            self._add(llama_cpp.llama_sampler_init_min_p(_IMPOSSIBLE, 1))
            self._add(llama_cpp.llama_sampler_init_typical(sampling.typical_p, 1))
        if sampling.top_p < 1:
            self._add(llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1))


def _new_chain() -> object:
    return llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
