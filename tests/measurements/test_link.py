"""The measurement itself, on a few tokens; what it says of speed is not looked at."""

from __future__ import annotations

import json
from pathlib import Path

from measurements.link import CODECS, MEMCPY, ZMQ, run, summarize


def test_every_way_is_measured_and_written(tmp_path: Path) -> None:
    # More than one chunk, so that credits are needed, and a last one that is not full.
    run(tmp_path / "link.json", tmp_path / "link.png", 1, 520)
    written = json.loads((tmp_path / "link.json").read_text())
    assert written["measure"] == "link"
    assert [sample["way"] for sample in written["samples"]].count("raw") == 1
    assert {sample["way"] for sample in written["samples"]} == {MEMCPY, ZMQ, *CODECS}
    assert written["summary"] == summarize(written["samples"])
    assert (tmp_path / "link.png").stat().st_size > 1000


def test_ratios_are_taken_within_a_round() -> None:
    speeds = {1: 2.0, 2: 8.0, 3: 4.0}
    samples = [
        {"way": way, "round": turn, "gb_per_s": speed * (0.5 if way == "raw" else 1.0)}
        for way in (MEMCPY, ZMQ, *CODECS)
        for turn, speed in speeds.items()
    ]
    summary = summarize(samples)
    assert summary["loopback_raw_gb_per_s"] == 2.0
    assert summary["loopback_raw_vs_zmq"] == 0.5
    assert (summary[ZMQ]["smallest"], summary[ZMQ]["largest"]) == (2.0, 8.0)
