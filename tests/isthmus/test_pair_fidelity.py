"""What ``isthmus pair fidelity`` makes of a measurement; the measurement itself is tested where it is."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner

from isthmus.cli import cli
from measurements import fidelity
from transfer.config import Pair

SUMMARY: dict[str, Any] = {"kl_native": 0.01, "raw": {"kl_split": 0.02}, "q8": {"kl_split": 0.3}}


@pytest.mark.parametrize(("limit", "exit_code"), [("0.5", 0), ("0.3", 0), ("0.1", 1)])
def test_the_exit_code_says_whether_a_codec_is_too_far(
    limit: str, exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Pair, tuple[str, ...]]] = []

    def run(pair: Pair, names: tuple[str, ...], *_: object) -> dict[str, Any]:
        asked.append((pair, names))
        return SUMMARY

    monkeypatch.setattr(fidelity, "run", run)
    result = CliRunner().invoke(cli, ["pair", "fidelity", "hf", "Some-1B-Q4_K_M.gguf", "--max-kl", limit])
    assert asked == [(Pair(name="Some-1B", hf_dir="hf", gguf="Some-1B-Q4_K_M.gguf"), ("raw", "q8"))]
    assert result.exit_code == exit_code
    assert ("q8: 3.00e-01 nats from fp32" in result.stderr) == bool(exit_code)
    assert "raw" not in result.stderr


def test_a_limit_of_nothing_is_refused() -> None:
    result = CliRunner().invoke(cli, ["pair", "fidelity", "hf", "gguf", "--max-kl", "0"])
    assert result.exit_code == 2
    assert "--max-kl" in result.stderr
