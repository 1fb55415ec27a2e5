from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest
from rich.console import Console

from isthmus.ask import Answer
from isthmus.compare import comparison_table, verdict
from isthmus.demo import MAX_TOKENS, question
from isthmus.ledger_table import ledger_table
from proxy.ledger import Account, Entry
from tests.conftest import ModelPair
from transfer.config import Prefill


def text_of(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def entry(**changes: Any) -> dict[str, Any]:
    closed = msgspec.structs.replace(Account("r-1", "m").close("ok"), route="split", codec="q8", **changes)
    return msgspec.to_builtins(closed)


def answer(total_ms: float, tokens: int = 64) -> Answer:
    return Answer(
        text="x", completion_tokens=tokens, ttft_ns=int(1e5 * total_ms), total_ns=int(1e6 * total_ms), ledger={}
    )


def test_the_question_is_about_a_thousand_tokens(default_pair: ModelPair) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_pair.hf_dir)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": question()}], add_generation_prompt=True)
    num_tokens = len(rendered["input_ids"])
    assert 950 <= num_tokens <= 1050
    assert num_tokens + MAX_TOKENS < Prefill().max_model_len


def test_the_ledger_table_shows_every_stage_of_an_entry() -> None:
    durations = [name for name in Entry.__struct_fields__ if name.endswith("_ns")]
    shown = text_of(ledger_table(entry(**{name: (i + 1) * 1_234_000 for i, name in enumerate(durations)})))
    for i, name in enumerate(durations):
        assert f"{(i + 1) * 1.234:,.1f} ms" in shown, f"{name} is missing"


def test_the_ledger_table_shows_bytes_and_the_sign_of_the_gain() -> None:
    changes = {"kv_raw_bytes": 20 << 20, "kv_wire_bytes": 11 << 20, "specialization_gain_ns": -5_000_000}
    shown = text_of(ledger_table(entry(**changes)))
    assert "20.00 MiB" in shown
    assert "11.00 MiB" in shown
    assert "55% of raw" in shown
    assert "-5.0 ms" in shown


def test_the_ledger_table_survives_an_entry_without_transfer() -> None:
    shown = text_of(ledger_table(entry() | {"route": "gpu", "codec": None, "ttft_ns": None}))
    assert "route gpu" in shown
    assert "codec" not in shown


def test_the_comparison_shows_medians_and_spread() -> None:
    answers = {"split": [answer(900), answer(1000), answer(1700)], "gpu": [answer(2000)] * 3, "cpu": [answer(3000)] * 3}
    shown = text_of(comparison_table(answers))
    assert "1,000.0 ms (900 to 1,700)" in shown
    assert "medians of 3" in shown


def test_tpot_is_per_token_after_the_first() -> None:
    assert answer(100, tokens=10).tpot_ns == pytest.approx(10e6)


def test_the_verdict_names_the_winner_even_when_it_is_not_split() -> None:
    said = verdict({"split": [answer(2000)], "gpu": [answer(1000)], "cpu": [answer(3000)]})
    assert said.startswith("gpu was the fastest")
    assert "2.00 times split's speed" in said
    assert "3.00 times cpu's speed" in said
    assert "Some runs" not in said


def test_the_verdict_says_when_samples_overlap() -> None:
    said = verdict({"split": [answer(1000), answer(1000), answer(1600)], "gpu": [answer(1500)] * 3})
    assert "Some runs of gpu were as fast" in said
