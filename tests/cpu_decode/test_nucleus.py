"""Our top_p against llama.cpp's: the same tokens, from the same seeds.

Nearly always: llama.cpp adds up likelihoods in fp32, one by one, and of thousands of tokens that is off by enough to
draw a neighbour now and then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import llama_cpp
import numpy as np
import pytest

from cpu_decode.llama import TOKEN_DATA, Context, Model
from cpu_decode.nucleus import Nucleus, apply
from cpu_decode.sampling import Sampler
from tests.cpu_decode.asking import PROMPT
from tests.cpu_decode.native_kv import prefill
from transfer.messages import Reserve, Sampling

STEPS = 40


@pytest.fixture(scope="module")
def prompted(model: Model) -> Iterator[Context]:
    """A context in whose newest batch row 0 are the logits behind a prompt."""
    context = Context(model, num_cells=256, max_sequences=1, batch_tokens=64, threads=1, cell_type="bf16")
    prefill(context, 0, PROMPT)
    yield context
    context.close()


def chain(*samplers: object) -> object:
    made = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for sampler in samplers:
        llama_cpp.llama_sampler_chain_add(made, sampler)
    return made


def theirs(context: Context, sampling: Sampling) -> list[int]:
    """What llama.cpp's own chain draws from the last row."""
    vocab_size = context.model.vocab_size
    samplers = []
    if sampling.logit_bias:
        pairs = [llama_cpp.llama_logit_bias(token=t, bias=b) for t, b in sampling.logit_bias.items()]
        array = (llama_cpp.llama_logit_bias * len(pairs))(*pairs)
        samplers.append(llama_cpp.llama_sampler_init_logit_bias(vocab_size, len(pairs), array))
    if sampling.repetition_penalty != 1:
        repetition = llama_cpp.llama_sampler_init_penalties(vocab_size, 512, sampling.repetition_penalty, 0.0, 0.0)
        for token in PROMPT:
            llama_cpp.llama_sampler_accept(repetition, token)
        samplers.append(repetition)
    samplers.append(llama_cpp.llama_sampler_init_temp(sampling.temperature))
    if sampling.min_p:
        samplers.append(llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1))
    samplers.append(llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.xtc_probability:
        samplers.append(
            llama_cpp.llama_sampler_init_xtc(sampling.xtc_probability, sampling.xtc_threshold, 1, sampling.seed)
        )
    made = chain(*samplers, llama_cpp.llama_sampler_init_dist(sampling.seed))
    drawn = [llama_cpp.llama_sampler_sample(made, context.handle, len(PROMPT) - 1) for _ in range(STEPS)]
    llama_cpp.llama_sampler_free(made)
    return drawn


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.2, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 1.0, "top_p": 0.8, "repetition_penalty": 1.3},
        {"temperature": 1.0, "top_p": 0.8, "logit_bias": {905: 9.0, 504: -5.0}},
        {"temperature": 1.0, "top_p": 0.9, "xtc_probability": 0.5, "xtc_threshold": 0.02},
    ],
    ids=["plain", "min_p", "penalty", "bias", "xtc"],
)
def test_the_same_seed_draws_what_llama_cpp_would_draw(prompted, more):
    for seed in (1, 2):
        sampling = Sampling(max_tokens=STEPS, seed=seed, **more)
        reserve = Reserve(request_id="r", prompt=PROMPT, sampling=sampling, source="local")
        sampler = Sampler(prompted.model, reserve)
        drawn = [sampler.sample(prompted, len(PROMPT) - 1).token for _ in range(STEPS)]
        sampler.close()
        same = sum(one == other for one, other in zip(drawn, theirs(prompted, sampling), strict=True))
        # Draws from different distributions agree in hardly any.
        assert same >= 0.8 * STEPS, same
        assert len(set(drawn)) > 1


@pytest.mark.parametrize("more", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
def test_a_bias_decides_and_is_gone_from_the_logits(prompted, more):
    before = prompted.logits(len(PROMPT) - 1)
    likeliest = int(before.argmax())
    sampling = Sampling(max_tokens=1, seed=1, logit_bias={905: 200.0, likeliest: -math.inf}, ignore_eos=True, **more)
    sampler = Sampler(prompted.model, Reserve(request_id="r", prompt=PROMPT, sampling=sampling, source="local"))
    assert sampler.sample(prompted, len(PROMPT) - 1).token == 905
    sampler.close()
    assert np.array_equal(prompted.logits(len(PROMPT) - 1), before)


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 30.0], ids=["flat", "nearly flat", "usual", "certain"])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.999])
def test_what_is_kept_is_what_a_full_sort_keeps(prompted, spread, top_p):
    size = prompted.model.vocab_size
    logits = (np.random.default_rng(5).standard_normal(size) * spread).astype(np.float32)
    logits[100:200] = -np.inf
    before = logits.copy()
    kept = Nucleus(0.7, 0.0, top_p).keep(prompted, logits)
    assert np.array_equal(logits, before)
    p = np.exp((logits.astype(np.float64) - logits.max()) / 0.7)
    p /= p.sum()
    sums = np.cumsum(np.sort(p)[::-1])
    expected = int(np.searchsorted(sums, top_p)) + 1
    # The sums are of fp32 likelihoods here: a token at the edge may fall on either side.
    assert abs(kept.size - expected) <= max(1, expected // 1000)
    assert (np.diff(kept["logit"]) <= 0).all()
    assert not set(kept["id"].tolist()) & set(range(100, 200))
    assert p[kept["id"]].sum() == pytest.approx(sums[expected - 1], abs=1e-4)


@pytest.mark.parametrize("min_p", [0.0, 0.004], ids=["all", "min_p"])
def test_unlikely_tokens_are_drawn_as_often_as_likely(prompted, min_p):
    """Half of the mass lies on tokens of which none is likely; chi-squared of a draw by groups of tokens."""
    size, draws, groups = prompted.model.vocab_size, 2000, 8
    p = np.full(size, 1e-12)
    p[:4] = [0.3, 0.1, 0.06, 0.04]
    p[1000:3000] = 0.5 / 2000
    p[5000:5500] = 0.0
    logits = np.log(np.maximum(p, 1e-30)).astype(np.float32)
    p[p < min_p * p.max()] = 0
    nucleus = Nucleus(1.0, min_p, 1.0)
    drawing = chain(llama_cpp.llama_sampler_init_dist(7))
    drawn = [nucleus.draw(prompted, logits, drawing) for _ in range(draws)]
    llama_cpp.llama_sampler_free(drawing)
    assert (p[drawn] > 1e-12).all()
    group = np.zeros(size, np.intp)
    group[1:4] = [1, 2, 3]
    group[1000:3000] = 4 + np.arange(2000) // 500
    expected = draws * np.bincount(group, p / p.sum(), groups)
    seen = np.bincount(group[drawn], minlength=groups)
    possible = expected > 1
    # 24.3 is exceeded once in a thousand seeds, with 7 degrees of freedom.
    assert ((seen - expected)[possible] ** 2 / expected[possible]).sum() < 24.3
    assert seen[~possible].sum() == 0


def test_samplers_see_the_candidates_they_are_given():
    greedy = chain(llama_cpp.llama_sampler_init_greedy())
    candidates = np.zeros(3, TOKEN_DATA)
    candidates["id"], candidates["logit"] = [7, 8, 9], [0.0, 2.0, 1.0]
    assert apply(greedy, candidates) == 8
    llama_cpp.llama_sampler_free(greedy)
