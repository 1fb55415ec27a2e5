"""``suffix``: which tokens a vocabulary has for a gap, and what is asked of the engines with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer

from proxy.infill import Infill, continued, find
from tests.proxy.conftest import make_cluster, running
from tests.proxy.test_failures import error_of
from transfer.messages import Reserve

QWEN = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|endoftext|>"]


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (QWEN, (3, 4)),
        (["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], ()),
        (["\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>"], (3,)),
        (["<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"], ()),
    ],
)
def test_the_families(tokens, ends):
    found = find({token: number for number, token in enumerate(tokens)})
    assert found == Infill(0, 1, 2, ends)
    assert found.prompt([7, 8], [9]) == [0, 7, 8, 1, 9, 2]


def test_two_of_three_marks_are_none():
    assert find({"<fim_prefix>": 0, "<fim_suffix>": 1, "<|fim_middle|>": 2}) is None


def test_what_follows_the_gap_gets_no_space_in_front():
    pieces = ["<unk>", "\u2581", "a", "\u263a"]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Prepend("\u2581")

    def tokenize(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    assert tokenize("aa") == [1, 2, 2]
    assert continued("aa", tokenize, byte_level=False) == [2, 2]


@pytest.fixture(scope="module")
def coder(hf_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    """A proxy for a model that can fill gaps."""
    tokenizer = AutoTokenizer.from_pretrained(hf_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN})
    folder = tmp_path_factory.mktemp("coder")
    tokenizer.save_pretrained(folder)
    with running(make_cluster(folder)) as stack:
        yield stack


@pytest.mark.parametrize("route", ["split", "gpu", "cpu"])
def test_a_gap_is_filled_on_every_route(coder, route):
    coder.worker.said.clear()
    coder.prefill.bodies.clear()
    answer = coder.complete({"X-Isthmus-Route": route}, prompt=["ab", [40, 41]], suffix="c d", stop_token_ids=[5])
    assert answer.status_code == 200, answer.text
    vocabulary = coder.gateway.renderer.vocabulary
    ends = (5, *coder.gateway.renderer.gap_ends)
    assert len(ends) == 3
    if route == "gpu":
        asked = [(body["prompt"], tuple(body["stop_token_ids"])) for body in coder.prefill.bodies]
    else:
        asked = [(reserve.prompt, reserve.sampling.stop_token_ids) for reserve in coder.worker.heard(Reserve)]
    texts = sorted(vocabulary.text(prompt) for prompt, _ in asked)
    marked = "<|fim_prefix|>{}<|fim_suffix|>c d<|fim_middle|>"
    assert texts == sorted(marked.format(before) for before in ("ab", vocabulary.text([40, 41])))
    assert {stops for _, stops in asked} == {ends}


def test_without_a_suffix_nothing_changes(coder):
    coder.worker.said.clear()
    assert coder.complete({"X-Isthmus-Route": "cpu"}, suffix="").status_code == 200
    (reserve,) = coder.worker.heard(Reserve)
    assert coder.gateway.renderer.vocabulary.text(reserve.prompt) == "hi"
    assert reserve.sampling.stop_token_ids == ()


def test_a_model_without_such_tokens_says_so(stack):
    error = error_of(stack.complete(suffix="x"), 400)
    assert error["param"] == "suffix"
    assert "<|fim_prefix|>" in error["message"]


def test_what_does_not_go_with_a_suffix(coder):
    assert error_of(coder.complete(suffix="x", echo=True), 400)["param"] == "suffix"
    assert error_of(coder.complete(suffix="x", prompt=[9999]), 400)["param"] == "prompt"
