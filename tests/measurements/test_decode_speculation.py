from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from measurements import decode, decode_speculation
from transfer.config import Decode


def test_every_start_has_workers_of_its_own_and_every_repeat_begins_with_the_other_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []

    @contextmanager
    def worker(_: Path, settings: Decode) -> Iterator[str]:
        started.append(settings.speculate)
        yield f"{settings.speculate} {len(started)}"

    @contextmanager
    def bf16(gguf: Path) -> Iterator[Path]:
        yield gguf

    monkeypatch.setattr(decode_speculation, "live_worker", worker)
    monkeypatch.setattr(decode_speculation, "bf16_weights", bf16)
    monkeypatch.setattr(decode_speculation, "_decode", lambda worker, *_: {"by": worker})
    taken = list(decode_speculation.measure(decode.setting(None, "1", 60, 24), 0))
    assert len(started) == len({s["by"] for s in taken}) == 2 * 2 * decode_speculation.STARTS
    assert len(taken) == len(started) * len(decode_speculation.TEXTS) * len(decode_speculation.COUNTS) * 2
    first = {(s["weights"], s["repeat"]): s["speculate"] for s in reversed(taken)}
    assert [first["file", repeat] for repeat in range(4)] == ["off", "auto", "off", "auto"]


def test_copied_prompts_repeat_a_block_and_new_ones_do_not() -> None:
    copied, new = (decode_speculation.prompt(text, 3) for text in ("copied", "new"))
    assert len(copied) == len(new)
    assert copied == copied[:48] * 4
    assert new[:48] != new[48:96]
