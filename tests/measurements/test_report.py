from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from isthmus.cli import cli
from measurements import report, report_files, report_tables
from measurements.report_files import Problem
from transfer.errors import ConfigError

COMMIT = "a" * 40


def save(folder: Path, name: str, measure: str = "codec", **changes: object) -> Path:
    """A result file whose every part is in order, unless ``changes`` replace it."""
    envelope = {
        "schema": "isthmus.measure/1",
        "measure": measure,
        "command": ["isthmus", "measure", measure],
        "environment": {"commit": COMMIT, "cpu": {"model": "EPYC", "usable_cores": 2}, "load": {"1min": 0.1}},
        "samples": [{"x": 1}],
        "summary": {"memcpy_gb_per_s": {"median": 7.0}, "raw": {"kl_mean": 0.0}, "q8": {"kl_mean": 0.002}},
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(envelope | changes))
    path.with_suffix(".png").write_bytes(b"\x89PNG")
    return path


def whats(folder: Path) -> list[str]:
    return [problem.what for problem in report_files.collect(folder)[1] if "not measured" not in problem.what]


def test_a_result_in_order_has_no_problem_but_what_is_missing_beside_it(tmp_path: Path) -> None:
    save(tmp_path, "codec")
    results, problems = report_files.collect(tmp_path)
    assert [result.measure for result in results] == ["codec"]
    (missing,) = problems
    assert missing.what == "not measured: link, prefill, decode, proxy, pool, fidelity, crossover, advise, ledger"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": []}, "holds no samples"),
        ({"summary": {"memcpy_gb_per_s": 1, "raw": None}}, "its summary lacks raw, q8"),
        ({"environment": {}}, "does not say from which commit it is"),
        ({"environment": {"commit": COMMIT + "+"}}, "files differed from commit aaaaaaaaa"),
        ({"environment": {"commit": COMMIT, "load": {"1min": 3.0}}}, "the machine had a load of 3.00 before it began"),
        ({"environment": {"commit": COMMIT, "load": "high", "cpu": 3, "gpu": "none"}}, None),
    ],
)
def test_doubts(tmp_path: Path, changes: dict, said: str | None) -> None:
    save(tmp_path, "codec", **changes)
    assert whats(tmp_path) == ([said] if said else [])


def test_what_a_measurement_says_against_itself_stands_above_the_numbers(tmp_path: Path) -> None:
    summary = {"memcpy_gb_per_s": 1, "raw": 1, "q8": 1, "problems": ["not counted: gpu at 4: it died"]}
    save(tmp_path, "codec", summary=summary)
    assert whats(tmp_path) == ["not counted: gpu at 4: it died"]
    assert "- **codec.json**: not counted: gpu at 4: it died" in report.render(
        "report.md.j2", *report_files.collect(tmp_path)
    )


def test_a_picture_that_is_missing(tmp_path: Path) -> None:
    save(tmp_path, "codec").with_suffix(".png").unlink()
    assert whats(tmp_path) == ["has no picture"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "its schema is not isthmus.measure/1"),
        ('{"schema": "isthmus.measure/2"}', "its schema is not isthmus.measure/1"),
        ('{"schema": "isthmus.measure/1", "measure": "codec"}', "its `command` is missing or of another kind"),
    ],
)
def test_files_that_are_no_results_are_left_out_and_named(tmp_path: Path, text: str, said: str) -> None:
    save(tmp_path, "codec")
    (tmp_path / "odd.json").write_text(text)
    results, problems = report_files.collect(tmp_path)
    assert len(results) == 1
    assert problems[0].where == "odd.json"
    assert problems[0].what.startswith(f"left out: {said}")


def test_what_is_not_a_number_leaves_the_file_out(tmp_path: Path) -> None:
    save(tmp_path, "codec")
    save(tmp_path, "link", "link", samples=[{"gb_per_s": [1.0, float("nan")]}])
    save(tmp_path, "decode", "decode", summary={"a": {"b": float("inf")}})
    results, problems = report_files.collect(tmp_path)
    assert [result.measure for result in results] == ["codec"]
    assert problems[:2] == [
        Problem("decode.json", "left out: `summary.a.b` is not a number"),
        Problem("link.json", "left out: `samples[0].gb_per_s[1]` is not a number"),
    ]


def test_results_of_two_commits_stand_apart_and_are_flagged(tmp_path: Path) -> None:
    about = {"commit": "b" * 40, "cpu": {"model": "EPYC"}}
    save(tmp_path, "first", summary={"memcpy_gb_per_s": 4.0, "raw": {"kl": 1.0}, "q8": {"kl": 1.0}})
    save(tmp_path, "second", summary={"memcpy_gb_per_s": 8.0, "raw": {"kl": 3.0}, "q8": {"kl": 3.0}}, environment=about)
    (what,) = whats(tmp_path)
    assert what.startswith("results of 2 commits stand side by side")
    assert "aaaaaaaaa: first.json; bbbbbbbbb: second.json" in what
    text = report.render("report.md.j2", *report_files.collect(tmp_path))
    assert re.findall(r"memcpy_gb_per_s \| (\S+) ", text) == ["4", "8"]


def test_results_of_two_machines_are_flagged(tmp_path: Path) -> None:
    save(tmp_path, "first")
    save(tmp_path, "second", environment={"commit": COMMIT, "cpu": {"model": "Xeon"}})
    assert whats(tmp_path) == ["results of 2 machines: EPYC; Xeon"]


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no result"):
        report_files.collect(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        report_files.collect(tmp_path / "none")


def test_the_page_holds_its_pictures_and_runs_nothing_of_the_files(tmp_path: Path) -> None:
    save(tmp_path, "codec", command=["isthmus", "<script>alert(1)</script>"])
    result = CliRunner().invoke(cli, ["measure", "report", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    html, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    picture = base64.b64encode((tmp_path / "codec.png").read_bytes()).decode()
    assert f"data:image/png;base64,{picture}" in html
    assert "<script>" not in html
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert "![codec](codec.png)" in markdown
    assert "| q8 | 0.002 |" in markdown


def test_what_results_say_in_short(tmp_path: Path) -> None:
    speeds = {"loopback_raw_gb_per_s": 2.4, "loopback_raw_vs_zmq": 0.66, "loopback_raw_vs_zmq_copied": 0.81}
    save(tmp_path, "link", "link", summary=speeds)
    save(tmp_path, "crossover", "crossover", summary={"workloads": 3, "validation": {"why": "no"}})
    save(tmp_path, "advise", "advise", summary={"workloads": {"<b>": {"verdict": "don't split"}}})
    html, markdown = (report.render(f"report.{kind}.j2", *report_files.collect(tmp_path)) for kind in ("html", "md"))
    assert "loopback, raw: 2.40 GB/s, 0.66 of bare ZeroMQ" in html
    assert "10 Gbit/s" not in html
    assert "simulated, &lt;b&gt;: don&#39;t split" in html
    assert "- link.json\n  - loopback, raw: 2.40 GB/s" in markdown


def test_many_notes_about_a_file_are_folded(tmp_path: Path) -> None:
    notes = [f"note {number}" for number in range(6)]
    save(tmp_path, "codec", summary={"memcpy_gb_per_s": 1, "raw": 1, "q8": 1, "problems": notes})
    html = report.render("report.html.j2", *report_files.collect(tmp_path))
    assert "<strong>codec.json</strong>: 6 notes</summary>" in html
    assert all(f"<li>{note}</li>" in html for note in notes)


def test_markdown_tables_are_whole(tmp_path: Path) -> None:
    save(tmp_path, "codec", summary={"memcpy_gb_per_s": 1, "raw": {"a|b": "x\ny"}, "q8": {"a|b": "z"}})
    lines = report.render("report.md.j2", *report_files.collect(tmp_path)).splitlines()
    at = lines.index("|  | a\\|b |")
    assert lines[at + 1 : at + 4] == ["|---|---|", "| raw | x y |", "| q8 | z |"]


def test_tables_show_numbers_alone_and_things_alike_together() -> None:
    summary = {
        "ratio": 0.69123,
        "pays": True,
        "nothing": None,
        "raw": {"bits": 16.0, "speed": {"median": 2.0, "quartile_1": 1.0}},
        "q8": {"bits": 8.5, "speed": {"median": 20_000.5}},
        "workloads": {"chat": {"verdict": "no"}, "burst": {"verdict": "yes"}, "other": {"n": 3}},
        "kv": [{"tokens": 512}, {"tokens": 1024}],
    }
    assert report_tables.tables(summary) == [
        ("", ["", "value"], [["ratio", "0.6912"], ["pays", "yes"], ["nothing", "-"]]),
        ("", ["", "bits", "speed"], [["raw", "16", "2"], ["q8", "8.5", "20,000"]]),
        ("workloads", ["", "verdict"], [["chat", "no"], ["burst", "yes"]]),
        ("workloads", ["", "n"], [["other", "3"]]),
        ("kv", ["", "tokens"], [["0", "512"], ["1", "1,024"]]),
    ]


def test_the_committed_results_make_a_report() -> None:
    folder = Path(report.__file__).parent / "results"
    text = report.render("report.html.j2", *report_files.collect(folder))
    assert "bits_per_element" in text
    assert "left out" not in text
    assert "In short" in text
    assert "one request, longer and longer prompts: split" in text
