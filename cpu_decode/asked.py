"""What a client may ask of a worker: everything is checked before llama.cpp sees it, which aborts on some of it."""

from __future__ import annotations

import math

from cpu_decode.logprobs import MAX_TOP
from transfer.errors import RequestError
from transfer.messages import Reserve, Sampling

MAX_BREAKERS = 16


def check(reserve: Reserve, vocab_size: int, max_sequences: int) -> None:
    """Raise :class:`RequestError`, naming the field, if ``reserve`` could never be served."""
    sampling = reserve.sampling
    if not reserve.prompt or sampling.max_tokens < 1:
        raise RequestError("prompt and max_tokens must be at least 1 token", "max_tokens")
    for param, tokens in (
        ("prompt", reserve.prompt),
        ("logit_bias", list(sampling.logit_bias)),
        ("stop_token_ids", list(sampling.stop_token_ids)),
    ):
        if not 0 <= min(tokens, default=0) <= max(tokens, default=0) < vocab_size:
            raise RequestError(f"{param} has token ids outside 0..{vocab_size - 1}", param)
    if not 0 <= reserve.prior_output < len(reserve.prompt):
        raise RequestError("prior_output must be less than the prompt has tokens", "prior_output")
    if not 1 <= reserve.choices <= max_sequences:
        raise RequestError(f"n must be 1 to {max_sequences}, the sequences of the decode worker", "n")
    _check_sampling(sampling)


def _check_sampling(sampling: Sampling) -> None:
    for param, value in (
        ("temperature", sampling.temperature),
        ("repetition_penalty", sampling.repetition_penalty),
        ("presence_penalty", sampling.presence_penalty),
        ("frequency_penalty", sampling.frequency_penalty),
        ("dry_multiplier", sampling.dry_multiplier),
        ("dry_base", sampling.dry_base),
        *(("logit_bias", bias) for bias in sampling.logit_bias.values()),
    ):
        if not math.isfinite(value):
            raise RequestError(f"{param} must be finite", param)
    if sampling.repetition_penalty <= 0:
        raise RequestError("repetition_penalty must be above 0", "repetition_penalty")
    if not 0 < sampling.typical_p <= 1:
        raise RequestError("typical_p must be above 0 and at most 1", "typical_p")
    for param, share in (("xtc_probability", sampling.xtc_probability), ("xtc_threshold", sampling.xtc_threshold)):
        if not 0 <= share <= 1:
            raise RequestError(f"{param} must be between 0 and 1", param)
    if len(sampling.dry_sequence_breakers) > MAX_BREAKERS:
        raise RequestError(f"dry_sequence_breakers may be {MAX_BREAKERS} at most", "dry_sequence_breakers")
    if not 0 <= sampling.min_tokens <= sampling.max_tokens:
        raise RequestError("min_tokens must be between 0 and max_tokens", "min_tokens")
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= MAX_TOP:
        raise RequestError(f"logprobs must be 0 to {MAX_TOP}", "logprobs")
