from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cpu_decode import numa
from isthmus.cli import cli
from measurements import bandwidth, memory, report_files
from transfer.errors import ConfigError


def sample(node: int | None, read: float) -> memory.Sample:
    return {"node": node, "round": 1, "threads": 2, "triad_gb_per_s": 2 * read, "read_gb_per_s": read}


def test_this_host_and_what_the_report_makes_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bandwidth, "ARRAY_BYTES", 1 << 20)
    monkeypatch.setattr(numa, "choose", lambda *_: ())
    out = tmp_path / "memory.json"
    done = CliRunner().invoke(cli, ["measure", "memory", "--rounds", "2", "--json", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    written = json.loads(out.read_text())
    assert [each["round"] for each in written["samples"]] == [1, 2]
    rates = [each["read_gb_per_s"] for each in written["samples"]]
    assert min(rates) > 0
    assert written["summary"]["host"]["read_gb_per_s"]["best"] == max(rates)
    assert [each.measure for each in report_files.collect(tmp_path)[0]] == ["memory"]


def test_each_node_has_its_own_numbers() -> None:
    summary = memory.summarize([sample(0, 40.0), sample(1, 10.0), sample(0, 60.0)])
    assert summary["node 0"]["read_gb_per_s"] == {"median": 50.0, "best": 60.0}
    assert summary["node 1"]["triad_gb_per_s"] == {"median": 20.0, "best": 20.0}
    assert [*memory.table(summary).columns[0].cells] == ["node 0", "node 1"]


def test_a_node_is_measured_from_a_process_that_is_bound_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that this kernel does not have: the refusal comes from the process that wanted to bind itself."""
    node = numa.Node(900, numa.cores({0}), 1 << 30, 1 << 30, {900: 10})
    monkeypatch.setattr(numa, "choose", lambda *_: (node,))
    with pytest.raises(ConfigError, match="cannot be bound to NUMA node 900"):
        memory.measure(1)
