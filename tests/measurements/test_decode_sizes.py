from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from isthmus.cli import cli
from measurements import decode, decode_sizes, targets
from measurements.decode_ways import Rate
from transfer.errors import ConfigError

WAYS = (decode.BENCH, decode.OURS, decode.SERVER, decode.SMALL_PAGES)


def samples() -> list[dict[str, Any]]:
    """A small model whose steps take 10 ms, ours 11 and in small pages 13, and a large one whose take 90 ms more.

    8 sequences take as long as one.
    """
    made: list[dict[str, Any]] = []
    for shape, step_ms, weights in (("small", 10, 100), ("large", 100, 10_000)):
        for count in (1, 8):
            for more, way in enumerate(WAYS):
                rate = {"way": way, "sequences": count, "tokens_per_s": 1e3 * count / (step_ms + more)}
                made.extend({"what": "rate", "shape": shape, "repeat": repeat, **rate} for repeat in range(3))
        megabytes = {"resident_bytes": weights + 300, "weights_bytes": weights, "cells_bytes": 20}
        made.append({"what": "memory", "shape": shape, **{key: n * 10**6 for key, n in megabytes.items()}})
    return made


def test_what_a_step_costs_beside_computing_weighs_less_on_a_large_model() -> None:
    shapes = decode_sizes.summarize(samples())["shapes"]
    assert shapes["small"]["vs_batched_bench"] == {"1": pytest.approx(10 / 11), "8": pytest.approx(10 / 11)}
    assert shapes["large"]["vs_batched_bench"] == {"1": pytest.approx(100 / 101), "8": pytest.approx(100 / 101)}
    assert shapes["large"]["vs_llama_server"]["8"] == pytest.approx(102 / 101)
    assert shapes["large"]["small_pages_vs_batched_bench"]["8"] == pytest.approx(100 / 103)
    for figures in shapes.values():
        assert figures["beyond_batched_bench_ms"] == {"1": pytest.approx(3.0), "8": pytest.approx(3.0)}
        assert figures["quartiles"]["vs_llama_server"]["8"] == pytest.approx([figures["vs_llama_server"]["8"]] * 2)
    assert shapes["large"]["step_ms"]["8"] == pytest.approx(101)
    assert shapes["large"]["memory_overhead_fraction"] == pytest.approx(280 / 10_020)


def test_each_size_passes_or_misses() -> None:
    found = {each.figure: each.passed for each in decode_sizes.verdicts(decode_sizes.summarize(samples()))}
    assert len(found) == 10
    assert [name for name, passed in found.items() if not passed] == [
        "small: vs_batched_bench, 1 sequences",
        "small: vs_batched_bench, 8 sequences",
        "small: memory_overhead_fraction",
    ]


def test_the_summary_can_be_shown_and_drawn(tmp_path: Path) -> None:
    summary = decode_sizes.summarize(samples())
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(decode_sizes.table(summary))
    console.print(targets.table(decode_sizes.verdicts(summary)))
    said = console.export_text()
    assert "…" not in said
    assert "large 267 MiB, +2.8%" in said
    assert "0.909 (0.769)" in said
    decode_sizes.draw(summary, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").stat().st_size > 10_000


def test_of_one_size_there_may_be_memory_alone(tmp_path: Path) -> None:
    little = [s for s in samples() if s["shape"] == "small" or s["what"] == "memory"]
    summary = decode_sizes.summarize(little)
    assert summary["shapes"]["large"]["vs_batched_bench"] == {}
    assert [v.figure for v in decode_sizes.verdicts(summary) if "large" in v.figure] == [
        "large: memory_overhead_fraction"
    ]
    decode_sizes.draw(summary, tmp_path / "sizes.png")
    assert "large 267 MiB" in str(decode_sizes.table(summary).caption)


def test_a_senseless_order_is_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_sizes, "tools", lambda _: pytest.fail("built llama.cpp's programs first"))
    with pytest.raises(ConfigError, match="there is no shape '70b', only 360m, 1b, 8b - at --shapes"):
        CliRunner().invoke(cli, ["measure", "decode-sizes", "--shapes", "1b,70b"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="'4,2' is not a list of ascending numbers"):
        CliRunner().invoke(cli, ["measure", "decode-sizes", "--sequences", "4,2"], catch_exceptions=False)


def test_a_real_worker_is_measured_beside_the_programs(default_pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def program(*_: object) -> Any:
        @contextmanager
        def up() -> Iterator[Rate]:
            yield lambda count: 10.0 * count

        return up()

    monkeypatch.setattr(decode, "bench_rate", program)
    monkeypatch.setattr(decode, "server_rate", program)
    setting = decode.setting(default_pair.gguf, "1,4", 40, 12)
    taken = list(decode_sizes.measure(setting, None))  # type: ignore[arg-type]
    by_way = {way: [s["sequences"] for s in taken if s.get("way") == way] for way in WAYS}
    assert by_way == {way: [1, 1, 1, 1, 4] * 3 for way in WAYS}
    memory = taken[-1]
    assert [s["what"] for s in taken].count("memory") == 1
    assert memory["what"] == "memory"
    assert memory["resident_bytes"] > memory["weights_bytes"] + memory["cells_bytes"]
