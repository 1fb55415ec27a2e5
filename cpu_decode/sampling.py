"""One llama.cpp sampler chain per sequence.

The order is vLLM's: biases, then penalties on the raw logits, then temperature, then min_p, top_k and top_p on the
scaled distribution (vLLM ``v1/sample/sampler.py``). Repetition penalty looks at prompt and output, presence and
frequency at the output only, as in vLLM; hence two penalty samplers.
"""

from __future__ import annotations

import ctypes
import math

import llama_cpp

from cpu_decode.llama import Context, Model
from transfer.messages import Sampling

_RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED: llama.cpp draws one
_GREEDY_BELOW = 1e-5  # vLLM's _SAMPLING_EPS


class Sampler:
    """Picks the next token of one sequence; :meth:`close` frees it."""

    def __init__(self, model: Model, sampling: Sampling, prompt: list[int]) -> None:
        self._chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        self._add_bias(model, sampling)
        window = len(prompt) + sampling.max_tokens
        if sampling.repetition_penalty != 1.0:
            repetition = llama_cpp.llama_sampler_init_penalties(
                model.vocab_size, window, sampling.repetition_penalty, 0.0, 0.0
            )
            for token in prompt:
                llama_cpp.llama_sampler_accept(repetition, token)
            self._add(repetition)
        if sampling.frequency_penalty or sampling.presence_penalty:
            self._add(
                llama_cpp.llama_sampler_init_penalties(
                    model.vocab_size, window, 1.0, sampling.frequency_penalty, sampling.presence_penalty
                )
            )
        if sampling.temperature < _GREEDY_BELOW:
            self._add(llama_cpp.llama_sampler_init_greedy())
            return
        self._add(llama_cpp.llama_sampler_init_temp(sampling.temperature))
        if sampling.min_p > 0:
            self._add(llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1))
        if sampling.top_k > 0:
            self._add(llama_cpp.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1:
            self._add(llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1))
        seed = _RANDOM_SEED if sampling.seed is None else sampling.seed % _RANDOM_SEED
        self._add(llama_cpp.llama_sampler_init_dist(seed))

    def sample(self, context: Context, row: int) -> int:
        """Sample from batch row ``row`` and remember the token."""
        return int(llama_cpp.llama_sampler_sample(self._chain, context.handle, row))

    def accept(self, token: int) -> None:
        """Remember a token that was sampled elsewhere."""
        llama_cpp.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        """Free the chain and its samplers."""
        llama_cpp.llama_sampler_free(self._chain)

    def _add(self, sampler: object) -> None:
        llama_cpp.llama_sampler_chain_add(self._chain, sampler)

    def _add_bias(self, model: Model, sampling: Sampling) -> None:
        bias = dict(sampling.logit_bias)
        if sampling.ignore_eos:
            bias.update(dict.fromkeys(model.end_tokens, -math.inf))
        if bias:
            pairs = (llama_cpp.llama_logit_bias * len(bias))(
                *(llama_cpp.llama_logit_bias(token=token, bias=value) for token, value in bias.items())
            )
            pointer = ctypes.cast(pairs, ctypes.POINTER(llama_cpp.llama_logit_bias))
            self._add(llama_cpp.llama_sampler_init_logit_bias(model.vocab_size, len(bias), pointer))
