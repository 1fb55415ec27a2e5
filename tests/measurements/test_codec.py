"""The measurement itself, on two short texts; what it says of speed is not looked at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from measurements import codec, kv, prompts
from measurements.codec import ROUNDING, WEIGHTS, draw, run, summarize
from transfer.codecs import CODECS
from transfer.config import Link
from transfer.geometry import KVGeometry
from transfer.layout import plane_elements

LOSSY = [name for name in CODECS if name not in ("raw", "lz4", "zstd")]

GEOMETRY = KVGeometry(
    model_fingerprint="m",
    num_layers=3,
    num_kv_heads=2,
    head_dim_k=64,
    head_dim_v=32,
    rope_dims=64,
    rope_theta=1e4,
    rope_scaling="none",
    sliding_window=0,
    vocab_size=100,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of one whole run."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        texts = prompts.texts()
        patch.setattr(prompts, "texts", lambda: {"prose": texts["prose"][:3400], "chat": texts["chat"][:600]})
        # Every text is long enough for a whole chunk of 64 tokens.
        patch.setattr(codec, "Link", lambda: Link(chunk_tokens=64))
        run(folder / "codec.json", folder / "codec.png", rounds=1)
    return folder


def test_a_run_has_a_sample_of_every_prompt_and_round(written: Path) -> None:
    result = json.loads((written / "codec.json").read_text())
    assert result["measure"] == "codec"
    fidelity = [(s["prompt"], s["codec"]) for s in result["samples"] if s["kind"] == "fidelity"]
    assert sorted(fidelity) == sorted((p, c) for p in ("prose", "chat") for c in (*CODECS, ROUNDING, WEIGHTS))
    speed = [s["codec"] for s in result["samples"] if s["kind"] == "speed"]
    assert sorted(speed) == sorted(["memcpy", *CODECS])
    assert (written / "codec.png").read_bytes().startswith(b"\x89PNG")


def test_lossless_codecs_change_nothing_and_the_others_little(written: Path) -> None:
    summary = json.loads((written / "codec.json").read_text())["summary"]
    for name in ("raw", "lz4", "zstd"):
        assert (summary[name]["kl_mean"], summary[name]["top1"]) == (0, 1)
    for name in (*LOSSY, "bf16_rounding", "weights_q8_0"):
        assert 0 < summary[name]["kl_mean"] < 0.2
    bits = {name: summary[name]["bits_per_element"] for name in CODECS}
    assert (bits["raw"], bits["q8"], bits["k8v4"]) == (16, 8.5, 6.5)
    assert (bits["rows_q8_0"], bits["rows_k8v4"], bits["rows_q4_0"]) == (8.5, 6.5, 4.5)
    assert bits["kvz3"] < bits["kvz2"] < bits["kvz1"] < bits["zstd"] < bits["lz4"] < 16


def test_frames_hold_every_element_once() -> None:
    tokens = 11
    planes = [
        np.arange(100 * index, 100 * index + size, dtype=np.uint16)
        for index in range(GEOMETRY.num_layers)
        for size in plane_elements(GEOMETRY, tokens)
    ]
    whole = kv.PromptKV("p", list(range(tokens)), [], planes)
    frames = list(kv.frames_of(whole, GEOMETRY, Link(chunk_tokens=4)))
    assert [(f.slab.tokens, f.first_layer) for f in frames] == [(range(4), 0), (range(4, 8), 0), (range(8, 11), 0)]
    landed = [[] for _ in planes]
    for frame in frames:
        assert frame.slab.num_layers == GEOMETRY.num_layers
        for parts, part in zip(landed, np.split(frame.elements, np.cumsum(frame.slab.planes)[:-1]), strict=True):
            parts.append(part)
    assert all(np.array_equal(np.concatenate(parts), plane) for parts, plane in zip(landed, planes, strict=True))


def test_divergence_is_kl_and_agreement() -> None:
    expected = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32))
    got = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]], np.float32)) + 3
    kl, top1 = kv.divergence(expected, got)
    assert kl == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2, abs=1e-6)
    assert top1 == 0.5
    assert kv.divergence(expected, expected) == (0, 1)


def test_rounding_to_bf16_rounds() -> None:
    ones = np.array([1.0, 1.0009765625], np.float16).view(np.uint16)
    rounded = kv.rounded_to_bf16(kv.PromptKV("p", [1, 2], [], [ones]))
    assert rounded.planes[0].tolist() == [0x3F80, 0x3F80]


def samples_of(speeds: dict[str, list[float]]) -> list[codec.Sample]:
    samples: list[codec.Sample] = [
        {"kind": "fidelity", "codec": yardstick, "kl": 0.5, "top1": 1.0} for yardstick in (ROUNDING, WEIGHTS)
    ]
    for name in CODECS:
        about = {"kind": "fidelity", "codec": name, "top1": 1.0}
        samples.append(about | {"prompt_tokens": 300, "bits_per_element": 8, "kl": 0.0})
        samples.append(about | {"prompt_tokens": 100, "bits_per_element": 4, "kl": 0.2})
    for turn, copy in enumerate(speeds["memcpy"]):
        samples.append({"kind": "speed", "codec": "memcpy", "round": turn, "copy_gb_per_s": copy})
        for name in CODECS:
            rate = speeds["codec"][turn]
            samples.append(
                {"kind": "speed", "codec": name, "round": turn, "encode_gb_per_s": rate, "decode_gb_per_s": 2 * rate}
            )
    return samples


def test_ratios_are_taken_within_a_round(tmp_path: Path) -> None:
    summary = summarize(samples_of({"memcpy": [10, 20, 40], "codec": [1, 4, 4]}))
    assert summary["memcpy_gb_per_s"] == {"median": 20, "quartile_1": 15, "quartile_3": 30}
    assert summary["q8"]["encode_vs_memcpy"] == pytest.approx(0.1)
    assert summary["q8"]["decode_vs_memcpy"] == pytest.approx(0.2)
    assert summary["q8"]["bits_per_element"] == 7
    assert summary["q8"]["kl_mean"] == pytest.approx(0.1)
    draw(summary, tmp_path / "made" / "codec.svg")
    assert "kvz3" in (tmp_path / "made" / "codec.svg").read_text()


def test_texts_are_six_and_always_the_same() -> None:
    assert len(prompts.texts()) == 6
    assert prompts.texts() == prompts.texts()
