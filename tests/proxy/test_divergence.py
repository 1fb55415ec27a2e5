from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from proxy.divergence import least_kl

VOCABULARY = 30
logits = arrays(np.float64, VOCABULARY, elements=st.floats(-20, 20))


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max()
    return shifted - np.log(np.exp(shifted).sum())


def top(logprobs: np.ndarray, count: int) -> dict[int, float]:
    return {int(token): float(logprobs[token]) for token in np.argsort(-logprobs, kind="stable")[:count]}


@given(logits, logits, st.integers(1, VOCABULARY))
@settings(deadline=None)
def test_it_is_never_more_than_the_kl_itself(p_logits, q_logits, count):
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    whole = float((np.exp(p) * (p - q)).sum())
    assert 0 <= least_kl(top(p, count), top(q, count)) <= whole + 1e-6


@given(logits, logits)
@settings(deadline=None)
def test_with_the_whole_vocabulary_it_is_the_kl(p_logits, q_logits):
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    whole = float((np.exp(p) * (p - q)).sum())
    assert least_kl(top(p, VOCABULARY), top(q, VOCABULARY)) == pytest.approx(whole, rel=1e-6, abs=1e-6)


@given(logits, st.integers(1, VOCABULARY))
def test_a_distribution_is_not_apart_from_itself(p_logits, count):
    p = log_softmax(p_logits)
    assert least_kl(top(p, count), top(p, count)) == pytest.approx(0, abs=1e-9)


def test_lists_with_nothing_in_common_are_far_apart():
    sure, other = {1: np.log(0.98), 2: np.log(0.01)}, {3: np.log(0.98), 4: np.log(0.01)}
    assert least_kl(sure, other) > 3


def test_a_small_change_is_small():
    logprobs = log_softmax(np.linspace(3, -3, VOCABULARY))
    changed = log_softmax(np.linspace(3, -3, VOCABULARY) + 0.01 * np.sin(np.arange(VOCABULARY)))
    assert 0 < least_kl(top(logprobs, 20), top(changed, 20)) < 1e-3
