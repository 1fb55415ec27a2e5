"""Drawing a token by temperature, min_p and top_p without sorting the vocabulary, or walking through it.

llama.cpp's own samplers compute every token's share of the whole one by one, and its top_p sorts through arrays that it
allocates anew each time: 0.4 and 0.7 ms for 49,000 tokens. Here likelihoods come out of a few vectorized passes, and
llama.cpp draws from the few tokens that matter.
"""

from __future__ import annotations

import math

import llama_cpp
import numpy as np
import numpy.typing as npt

from cpu_decode.llama import TOKEN_DATA, Context, TokenData

# Likelihoods over the greatest one above which tokens are looked at: first few, then all that are possible.
_LEVELS = (1e-2, 1e-4, 0.0)
_LIKELY = 1e-3
# Stands for all that are less likely.
_OTHERS = -2


class Nucleus:
    """Temperature, then min_p, then top_p (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020)."""

    def __init__(self, temperature: float, min_p: float, top_p: float) -> None:
        self._temperature = temperature
        # Of logits, where the greatest is 0.
        self._least = math.log(min_p) if min_p > 0 else -math.inf
        self._top_p = top_p

    def draw(self, context: Context, logits: npt.NDArray[np.float32], samplers: object) -> int:
        """The token that llama.cpp's ``samplers``, a drawing one the last of them, pick out of those that are kept.

        ``logits``, fp32 ``[vocab_size]``, stay as they are. Where everything is kept, ``samplers`` may only draw: one
        candidate stands for all unlikely tokens, and if it comes, one of those is drawn behind it.
        """
        if self._top_p < 1:
            return apply(samplers, self.keep(context, logits), ordered=True)
        scaled, likelihoods = self._weigh(context, logits)
        likely = np.flatnonzero(likelihoods > _LIKELY)
        rest = _sum(likelihoods) - _sum(likelihoods[likely])
        candidates = _candidates(np.append(likely, _OTHERS), scaled)
        candidates["logit"][-1] = math.log(rest) if rest > 0 else -math.inf
        token = apply(samplers, candidates)
        if token == _OTHERS:
            others = np.flatnonzero((likelihoods > 0) & (likelihoods <= _LIKELY))
            token = apply(samplers, _candidates(others, scaled))
        return token

    def keep(self, context: Context, logits: npt.NDArray[np.float32]) -> TokenData:
        """The tokens of ``logits`` that top_p keeps, the likeliest first: one at least.

        Their logits are over temperature, and 0 for the likeliest.
        """
        scaled, likelihoods = self._weigh(context, logits)
        wanted = self._top_p * _sum(likelihoods)
        for level in _LEVELS:
            tokens = np.flatnonzero(likelihoods > level)
            candidates = likelihoods[tokens]
            if level == 0.0 or _sum(candidates) >= wanted:
                break
        # By logits, for likelihoods round alike.
        order = np.argsort(-scaled[tokens], kind="stable")
        reached = np.cumsum(candidates[order], dtype=np.float64)
        # Rounding may leave the last sum just below what all of them make.
        count = min(int(np.searchsorted(reached, wanted)) + 1, tokens.size)
        return _candidates(tokens[order[:count]], scaled)

    def _weigh(
        self, context: Context, logits: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Logits over temperature, the greatest 0, and their exponentials, 0 where min_p takes a token out."""
        scaled, likelihoods = context.scratch
        np.divide(logits, self._temperature, out=scaled)
        scaled -= scaled.max()
        np.exp(scaled, out=likelihoods)
        if self._least > -math.inf:
            likelihoods[scaled < self._least] = 0.0
        return scaled, likelihoods


def apply(samplers: object, candidates: TokenData, *, ordered: bool = False) -> int:
    """Run llama.cpp's ``samplers`` over ``candidates``, which they change; returns the token that they select, or -1.

    ``ordered`` says that the likeliest come first.
    """
    array = llama_cpp.llama_token_data_array(
        data=candidates.ctypes.data_as(llama_cpp.llama_token_data_p), size=candidates.size, selected=-1, sorted=ordered
    )
    llama_cpp.llama_sampler_apply(samplers, array)
    # Not out of ``candidates``: XTC moves the beginning.
    return int(array.data[array.selected].id) if array.selected >= 0 else -1


def _candidates(tokens: npt.NDArray[np.intp], scaled: npt.NDArray[np.float32]) -> TokenData:
    made = np.zeros(tokens.size, TOKEN_DATA)
    made["id"] = tokens
    made["logit"] = scaled[tokens]
    return made


def _sum(values: npt.NDArray[np.float32]) -> float:
    return float(values.sum(dtype=np.float64))
