from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from cpu_decode import binding, numa, profile
from cpu_decode.profile import Profile
from measurements import bandwidth, decode, decode_tune, targets
from measurements.decode_latency import Load
from measurements.decode_plot import draw
from measurements.decode_targets import verdicts
from measurements.decode_ways import Rate, Setting, worker_rate
from tests.cpu_decode.test_profile import TUNED
from transfer.errors import ConfigError


def samples() -> list[dict[str, Any]]:
    """Two rounds of a machine on which our worker makes 90 and then 100 tokens/s, the others 100, all at 1 and at 8."""
    made: list[dict[str, Any]] = []
    for turn, speed in enumerate((90.0, 100.0)):
        made.append({"what": "bandwidth", "round": turn, "triad_gb_per_s": 8.0, "read_gb_per_s": 10.0})
        alike = (decode.OURS, decode.SMALL_PAGES, decode.BENCH, decode.SERVER)
        best = (decode.TUNED, decode.DEFAULT, decode.DEFAULT_SLOTS)
        for way in (*alike, *best):
            for count in (1, 8) if way in alike else (8,):
                rate = speed * count if way == decode.OURS else 100.0 * count
                made.extend(
                    {
                        "what": "rate",
                        "way": way,
                        "round": turn,
                        "turn": repeat,
                        "sequences": count,
                        "tokens_per_s": rate,
                    }
                    for repeat in range(3)
                )
        made.append({"what": "handoff_to_logits", "round": turn, "ms": 3.0 + turn, "sent_to_heard_ms": 9.0})
        for what, worst in (("handoff", 11.0), ("prefill", 20.0)):
            for during, ms in (("quiet", 10.0), ("disturbed", worst)):
                made.append({"what": f"itl_{what}", "round": turn, "repeat": 0, "during": during, "gaps_ms": [ms] * 50})
        for weights, gain in (("file", 1.0), ("bf16", 1.5 + turn / 10)):
            for speculate, rate in (("off", 100.0), ("auto", 100.0 * gain)):
                made.append(
                    {
                        "what": "speculation",
                        "round": turn,
                        "repeat": 0,
                        "weights": weights,
                        "text": "copied",
                        "speculate": speculate,
                        "sequences": 1,
                        "tokens_per_s": rate,
                    }
                )
        made.append(
            {
                "what": "memory",
                "round": turn,
                "resident_bytes": 125_400_000,
                "weights_bytes": 100_000_000,
                "cells_bytes": 20_000_000,
                "cell_bytes": 1000,
                "context_tokens": 1000,
            }
        )
    return made


def test_ratios_are_taken_within_a_round() -> None:
    summary = decode.summarize(samples())
    assert summary["vs_batched_bench"] == {"1": pytest.approx(0.95), "8": pytest.approx(0.95)}
    assert summary["vs_llama_server"] == {"1": pytest.approx(0.95), "8": pytest.approx(0.95)}
    assert summary["small_pages_vs_batched_bench"] == {"1": pytest.approx(1.0), "8": pytest.approx(1.0)}
    assert summary["quartiles"]["vs_batched_bench"]["8"] == pytest.approx([0.9, 1.0])
    assert summary["tuned_vs_llama_server_default"] == {"8": pytest.approx(1.0)}
    assert summary["tuned_vs_llama_server_slots"] == {"8": pytest.approx(1.0)}
    assert summary["itl_p99_handoff_ratio"] == pytest.approx(1.1)
    assert summary["itl_p99_prefill_ratio"] == pytest.approx(2.0)
    assert summary["handoff_to_logits_ms"] == pytest.approx(3.5)
    assert summary["memory_overhead_fraction"] == pytest.approx(0.045)


def test_ratios_are_between_neighbours_in_time() -> None:
    """The machine gets twice as fast from turn to turn; in each, ours is a tenth faster."""
    uneven = samples()
    for sample in uneven:
        if sample["what"] == "rate":
            pace = 100.0 * 2 ** sample["turn"] * (3 if sample["round"] else 1)
            sample["tokens_per_s"] = 1.1 * pace if sample["way"] == decode.OURS else pace
    summary = decode.summarize(uneven)
    assert summary["vs_llama_server"]["8"] == pytest.approx(1.1)
    # Of 110, 220, 440 and three times as much.
    assert summary["tokens_per_s"][decode.OURS]["8"] == pytest.approx(385)


def test_ways_take_turns_the_more_the_fewer_sequences() -> None:
    asked: list[tuple[str, int]] = []
    started: list[str] = []

    def way(name: str):
        @contextmanager
        def up() -> Iterator[Rate]:
            started.append(name)
            yield lambda count: asked.append((name, count)) or float(count)

        return up

    setting = decode.setting(None, "1,4", 60, 24)
    ways = (decode.BENCH, decode.OURS, decode.SERVER)
    taken = list(decode.rates(setting, {name: way(name) for name in ways}))
    assert asked == [(s["way"], s["sequences"]) for s in taken]
    assert asked[:6] == [(way, 1) for way in (*ways, *ways[2:], *ways[:2])]
    assert {count: {asked.count((way, count)) for way in ways} for count in (1, 4)} == {1: {12}, 4: {3}}
    # In processes of their own: three times four turns, and one.
    assert started == [*ways] * 3
    firsts = [s["way"] for s in taken[:: len(ways)] if s["sequences"] == 4]
    assert sorted(firsts) == sorted(ways)
    assert [s["start"] for s in taken] == [start for start in range(3) for _ in range(5 * len(ways))]


def test_guessing_is_compared_with_a_neighbour_in_time() -> None:
    assert decode.summarize(samples())["speculation"] == {
        "file weights, copied text, 1 sequences": pytest.approx(1.0),
        "bf16 weights, copied text, 1 sequences": pytest.approx(1.55),
    }


def test_each_figure_with_a_target_passes_or_misses() -> None:
    found = {each.figure: each.passed for each in verdicts(decode.summarize(samples()))}
    assert found == {
        "vs_batched_bench, 1 sequences": False,
        "vs_batched_bench, 8 sequences": False,
        "vs_llama_server, 1 sequences": False,
        "vs_llama_server, 8 sequences": False,
        "tuned_vs_llama_server_default, 8 sequences": False,
        "itl_p99_handoff_ratio": True,
        "itl_p99_prefill_ratio": True,
        "handoff_to_logits_ms": True,
        "memory_overhead_fraction": True,
        "speculation auto over off, file weights, copied text, 1 sequences": True,
        "speculation auto over off, bf16 weights, copied text, 1 sequences": True,
        "speculation auto over off, best on copied text": True,
    }


def test_a_step_reads_the_weights_once_and_every_sequences_cells() -> None:
    summary = decode.summarize(samples())
    # 95 steps/s of 101 and of 108 MB, over 10 GB/s.
    assert summary["bandwidth_vs_stream_by_sequences"]["1"] == pytest.approx(0.095 * 10.1)
    assert summary["bandwidth_vs_stream_by_sequences"]["8"] == pytest.approx(0.095 * 10.8)
    assert summary["bandwidth_vs_stream"] == pytest.approx(0.095 * 10.8)


def test_the_summary_can_be_shown_and_drawn(tmp_path: Path) -> None:
    summary = decode.summarize(samples())
    assert decode.table(summary).row_count == 14
    for table in (decode.table(summary), targets.table(verdicts(summary))):
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(table)
        assert "…" not in console.export_text()
    assert targets.table(verdicts(summary)).row_count == 12
    draw(summary, tmp_path / "decode.png")
    assert (tmp_path / "decode.png").stat().st_size > 10_000


@pytest.mark.parametrize("sequences", ["", "8,1", "1,1", "0,1", "one", "1000"])
def test_senseless_lists_of_sequences_are_refused(sequences: str) -> None:
    with pytest.raises(ConfigError, match="--sequences"):
        decode.setting(None, sequences, 900, 64)


def test_files_are_looked_at_before_anything_is_built(
    default_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (decode, decode_tune):
        monkeypatch.setattr(module, "tools", lambda _: pytest.fail("built llama.cpp's programs first"))
    nonsense = tmp_path / "nonsense"
    nonsense.write_text("nonsense")
    good, bad = (decode.setting(gguf, "1", 60, 24) for gguf in (default_pair.gguf, nonsense))
    for setting, profile_ in ((bad, ""), (good, str(nonsense))):
        with pytest.raises(ConfigError, match="nonsense"):
            decode.run(None, None, 1, setting, profile_)
    with pytest.raises(ConfigError, match="nonsense"):
        decode_tune.run(bad, tmp_path / "profile.json", 1)


def test_cells_suffice_for_both_parts(default_pair) -> None:
    few = decode.setting(default_pair.gguf, "1", 900, 64)
    assert few.num_cells == Load().cells(900) == 8 * 1500 + 4097
    assert few.max_sequences == 9
    many = decode.setting(default_pair.gguf, "32", 900, 64)
    assert (many.num_cells, many.max_sequences) == (32 * 964, 33)


def test_the_summary_says_in_which_shape_the_tuned_worker_was(tmp_path: Path) -> None:
    assert decode.summarize(samples())["tuned"] == {}
    file = tmp_path / "profile.json"
    profile.write(
        file, Profile(decode=msgspec.structs.replace(TUNED, cell_layout="streams"), gguf="m.gguf", host={}, seen={})
    )
    setting = decode.setting(None, "1", 60, 24)
    assert profile.apply(decode.tuned_decode(setting, str(file))).cell_layout == "streams"
    tuned = {"profile": True, "cell_layout": "streams", "flash_attention": False, "cell_type": "bf16"}
    summary = decode.summarize([*samples(), {"what": "tuned", "round": 0, **tuned}])
    assert summary["tuned"] == tuned
    assert "bf16 cells, streams, no flash attention" in str(decode.table(summary).caption)


def test_on_one_node_nothing_is_bound_and_on_several_the_first_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[numa.Node] = []
    nodes = [numa.Node(number, ((number,),), 1, 1, {0: 10, 1: 10}) for number in (0, 1)]
    monkeypatch.setattr(binding, "bind", bound.append)
    monkeypatch.setattr(numa, "read_topology", lambda: nodes[:1])
    decode.stay_on_one_node()
    assert bound == []
    monkeypatch.setattr(numa, "read_topology", lambda: nodes)
    decode.stay_on_one_node()
    assert bound == [nodes[0]]


def test_bandwidth_is_measured() -> None:
    assert bandwidth.triad_gb_per_s(1) > 0
    assert bandwidth.read_gb_per_s(1) > 0


@pytest.mark.engines
def test_a_real_worker_is_measured(default_pair) -> None:
    setting = Setting(
        gguf=default_pair.gguf,
        threads=1,
        context_tokens=40,
        new_tokens=12,
        sequences=(1, 2),
        num_cells=1024,
        max_sequences=3,
    )
    taken = list(decode.rates(setting, {decode.OURS: lambda: worker_rate(setting, setting.decode)}))
    assert [(s["start"], s["turn"], s["sequences"]) for s in taken] == [
        (start, turn, count) for start in range(3) for turn, count in enumerate((1, 1, 1, 1, 2, 2))
    ]
    assert all(sample["tokens_per_s"] > 0 for sample in taken)
    load = Load(sequences=2, handoff_tokens=100, handoffs=1, quiet_steps=20, short_tokens=60, short_handoffs=1)
    taken = list(decode.latency(setting, load, 7))
    assert {sample["round"] for sample in taken} == {7}
    assert [sample["what"] for sample in taken] == [
        "handoff_to_logits", "itl_handoff", "itl_handoff", "itl_prefill", "itl_prefill", "memory",
    ]  # fmt: skip
    assert all(sample["gaps_ms"] for sample in taken if "gaps_ms" in sample)
