"""How far two next-token distributions are apart, as far as their likeliest tokens tell."""

from __future__ import annotations

import math
from collections.abc import Mapping

# The bound converges geometrically; this is far more than it takes.
_ROUNDS = 50


def least_kl(reference: Mapping[int, float], other: Mapping[int, float]) -> float:
    """The least that KL(P || Q) can be, in nats, where ``reference`` and ``other`` hold the likeliest tokens of P and Q
    with the natural logs of their probabilities.

    The vocabulary is put into classes: each token that both name; those that only P names (B), those that only Q names
    (C), and the rest (D). The KL of the classes' masses,

        sum_t p_t ln(p_t / q_t) + p_B ln(p_B / x) + y ln(y / q_C) + p_D ln(p_D / q_D),

    is at most the KL of the tokens, for merging outcomes cannot make distributions easier to tell apart (the data
    processing inequality, Kullback and Leibler 1951). Q's mass x of B and P's mass y of C are not known, only that no
    token that was left out is likelier than the last one named: x <= |B| min(q), y <= |C| min(p), and neither is more
    than its side leaves. The sum is convex in both, so setting each to its best by turns finds the least that it can
    be. It is 0 for equal lists; two lists with nothing in common are far apart, and not, as for a plain intersection,
    alike.
    """
    p = {token: math.exp(logprob) for token, logprob in reference.items()}
    q = {token: math.exp(logprob) for token, logprob in other.items()}
    both = p.keys() & q.keys()
    p_b = math.fsum(p[token] for token in p.keys() - both)
    q_c = math.fsum(q[token] for token in q.keys() - both)
    p_left, q_left = max(0.0, 1 - math.fsum(p.values())), max(0.0, 1 - math.fsum(q.values()))
    most_x = min(q_left, len(p.keys() - both) * min(q.values(), default=1.0))
    most_y = min(p_left, len(q.keys() - both) * min(p.values(), default=1.0))
    x, y = most_x / 2, most_y / 2
    for _ in range(_ROUNDS):
        x = min(most_x, _share(q_left, p_b, p_left - y))
        y = min(most_y, _share(p_left, q_c, q_left - x))
    shared = math.fsum(p[token] * (reference[token] - other[token]) for token in both)
    rest = _term(p_b, x) + _term(y, q_c) + _term(p_left - y, q_left - x)
    return max(0.0, shared + rest)


def _share(whole: float, part: float, rest: float) -> float:
    """What ``part`` gets of ``whole`` when it is split as ``part`` to ``rest``."""
    return whole * part / (part + rest) if part + rest > 0 else 0.0


def _term(p: float, q: float) -> float:
    """P's part of the KL; rounding leaves masses that are hardly there."""
    if p <= _NOTHING:
        return 0.0
    return p * math.log(p / max(q, _NOTHING))


_NOTHING = 1e-9
