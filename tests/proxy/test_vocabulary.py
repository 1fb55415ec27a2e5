"""Tokens to bytes, for byte-level tokenizers and for those of the SentencePiece kind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from proxy.vocabulary import Vocabulary
from tests.conftest import ModelPair


@pytest.fixture(scope="session")
def smollm(default_pair: ModelPair):
    tokenizer = AutoTokenizer.from_pretrained(default_pair.hf_dir)
    return tokenizer, Vocabulary(tokenizer)


# The model has no token for some control characters.
@given(text=st.text(st.characters(exclude_categories=["C"]), max_size=40))
def test_the_pieces_of_a_text_are_its_bytes(smollm, text):
    tokenizer, vocabulary = smollm
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert b"".join(map(vocabulary.piece, tokens)) == text.encode()
    assert vocabulary.text(tokens) == text


def test_special_tokens_are_spelled_out_and_unknown_ids_empty(smollm):
    tokenizer, vocabulary = smollm
    assert vocabulary.piece(tokenizer.convert_tokens_to_ids("<|im_end|>")) == b"<|im_end|>"
    assert vocabulary.piece(10**9) == b""


def test_sentencepiece_spaces_and_bytes():
    tokens = ["<unk>", "\u2581gr", "<0xC3>", "<0xBC>", "\u2581"]
    tokenizer = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    assert vocabulary.text([1, 2, 3, 4]) == " grü "
    assert vocabulary.piece(2) == b"\xc3"
