"""Log probabilities as vLLM's ``raw_logprobs``: of the model's own logits, before sampling does anything to them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from transfer.messages import TokenLogprob

# OpenAI's limit, and vLLM's default.
MAX_TOP = 20


def token_logprob(logits: npt.NDArray[np.float32], token: int, num_top: int) -> TokenLogprob:
    """The natural log probability of ``token`` and of the ``num_top`` likeliest tokens, the likeliest first.

    ``logits`` is fp32 ``[vocab_size]``.
    """
    shifted = logits - logits.max()
    shifted -= np.log(np.exp(shifted).sum(dtype=np.float64))
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        likeliest = np.argpartition(shifted, -num_top)[-num_top:]
        likeliest = likeliest[np.argsort(-shifted[likeliest], kind="stable")]
        top = tuple((int(other), float(shifted[other])) for other in likeliest)
    return TokenLogprob(token, float(shifted[token]), top)
