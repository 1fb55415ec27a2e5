"""The measurement itself on two short texts, and what it works out from logits and words."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cpu_decode.llama import Model
from isthmus.pair import default_pair
from measurements import fidelity, prompts
from measurements.fidelity import NATIVE, negative_log_likelihood, run, same_words, summarize, too_far
from measurements.reference import Reference
from tests.measurements.test_codec import GEOMETRY
from transfer.config import Pair
from transfer.errors import ConfigError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of one whole run."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        texts = prompts.texts()
        patch.setattr(prompts, "texts", lambda: {"prose": texts["prose"][:1200], "chat": texts["chat"][:600]})
        run(default_pair(), ["raw", "kvz3"], None, folder / "fidelity.json", folder / "fidelity.svg")
    return folder


def test_a_run_has_every_way_to_the_kv(written: Path) -> None:
    result = json.loads((written / "fidelity.json").read_text())
    assert result["measure"] == "fidelity"
    ways = [(sample["prompt"], sample["way"]) for sample in result["samples"]]
    assert ways == [(prompt, way) for prompt in ("prose", "chat") for way in (NATIVE, "raw", "kvz3")]
    assert result["summary"] == summarize(result["samples"])
    assert "kvz3" in (written / "fidelity.svg").read_text()


def test_transplanted_kv_is_as_good_as_the_models_own(written: Path) -> None:
    summary = json.loads((written / "fidelity.json").read_text())["summary"]
    # KV in another order, or of other weights, is off by whole nats.
    assert 0 < summary["raw"]["kl_split"] < 0.05
    assert 0 < summary["kl_native"] < 0.05
    assert summary["raw"]["kl_split"] < summary["kvz3"]["kl_split"] < 0.3
    assert summary["raw"]["top1"] > 0.85
    assert 0 < summary["raw"]["kl_to_native"] < 0.05
    assert summary["raw"]["top1_to_native"] > 0.85
    assert summary["raw"]["greedy_divergence_tokens"] >= 3
    assert summary["raw"]["perplexity"] == pytest.approx(summary["perplexity_reference"], rel=0.05)


def test_windows_of_a_file_cover_it_and_begin_as_texts_do(tmp_path: Path) -> None:
    model = Model(Path(default_pair().gguf))
    try:
        words = " ".join(f"word{number}" for number in range(3000))
        (tmp_path / "long.txt").write_text(words)
        found = fidelity.prompts(model, tmp_path / "long.txt")
        assert 1 < len(found) <= fidelity.MAX_WINDOWS
        assert {len(prompt) + len(rest) for prompt, rest in found.values()} == {fidelity.WINDOW_TOKENS}
        *_, (_, last) = found.values()
        assert b"".join(map(model.piece, last)).decode().endswith("word2999")
        (tmp_path / "short.txt").write_text("too short")
        with pytest.raises(ConfigError, match=r"'short.txt 0' has \d+ tokens; it needs over 96"):
            fidelity.prompts(model, tmp_path / "short.txt")
        with pytest.raises(ConfigError, match="cannot read"):
            fidelity.prompts(model, tmp_path / "none.txt")
    finally:
        model.close()


def test_a_model_that_transformers_cannot_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="transformers cannot load"):
        Reference(tmp_path, "float32")


def test_sliding_windows_are_refused() -> None:
    reference = Reference(Path(default_pair().hf_dir), "bfloat16")
    sliding = msgspec.structs.replace(GEOMETRY, sliding_window=4, window_layers=(0,))
    with pytest.raises(ConfigError, match="sliding windows"):
        reference.planes([1, 2], sliding, "half", "half")


def test_a_pair_that_is_none_is_refused(tmp_path: Path) -> None:
    pair = default_pair()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError):
        run(Pair(name="m", hf_dir=str(tmp_path), gguf=pair.gguf), ["raw"], None, None, None)


def test_likelihood_of_the_true_tokens() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32)) + 7
    assert negative_log_likelihood(logits, [1, 1]) == pytest.approx(-(np.log(0.25) + np.log(0.8)) / 2, abs=1e-6)


def test_words_until_they_part() -> None:
    assert same_words([1, 2, 3], [1, 2, 3]) == 3
    assert same_words([1, 2, 3], [1, 9, 3]) == 1
    assert same_words([1, 2, 3], [9, 2, 3]) == 0


def test_means_over_prompts() -> None:
    samples = [
        {"way": way, "kl": kl, "top1": 1.0, "nll": nll, "nll_reference": 1.0, "greedy_divergence_tokens": words}
        for way, kl, nll, words in ((NATIVE, 0.1, 1.0, 5), (NATIVE, 0.3, 3.0, 7), ("raw", 0.2, 2.0, 4))
    ]
    samples[-1] |= {"kl_to_native": 0.1, "top1_to_native": 0.9}
    summary = summarize(samples)
    assert summary["kl_native"] == pytest.approx(0.2)
    assert summary["perplexity_native"] == pytest.approx(np.exp(2.0))
    assert summary["perplexity_reference"] == pytest.approx(np.e)
    assert summary["greedy_divergence_tokens_native"] == 6
    assert summary["raw"]["kl_split"] == 0.2
    assert (summary["raw"]["kl_to_native"], summary["raw"]["top1_to_native"]) == (0.1, 0.9)


def test_codecs_over_the_limit_are_named_with_both_values() -> None:
    summary = {"kl_native": 0.01, "raw": {"kl_split": 0.1}, "q8": {"kl_split": 0.25}, "k8v4": {"kl_split": math.nan}}
    found = too_far(summary, max_kl=0.1)
    assert [line.split(":")[0] for line in found] == ["q8", "k8v4"]
    assert found[0] == "q8: 2.50e-01 nats from fp32, more than 0.1; native prefill: 1.00e-02"
