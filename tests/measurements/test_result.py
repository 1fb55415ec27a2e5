from __future__ import annotations

import json
from pathlib import Path

import pytest

from measurements import result
from transfer.errors import ConfigError


def test_the_environment_says_what_a_result_may_depend_on() -> None:
    environment = result.environment()
    assert environment.keys() == {"commit", "versions", "cpu", "numa", "memory", "nic", "gpu", "load"}
    assert {"python", "kernel", "isthmus", "numpy"} <= environment["versions"].keys()
    assert environment["cpu"]["usable_cores"] >= 1
    assert environment["cpu"]["model"]
    assert environment["memory"]["total_bytes"] > environment["memory"]["available_bytes"] > 0
    assert environment["load"]["1min"] >= 0
    assert "lo" not in environment["nic"]


def test_the_commit_is_marked_where_files_differ_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": "abc", "status": " M file"}
    monkeypatch.setattr(result, "_output", lambda *command: answers[command[1]])
    assert result._commit() == "abc+"
    answers["status"] = ""
    assert result._commit() == "abc"
    monkeypatch.setattr(result, "_output", lambda *_: None)
    assert result._commit() is None


def test_programs_that_are_missing_or_fail_have_no_output() -> None:
    assert result._output("no-such-program-anywhere") is None
    assert result._output("false") is None
    assert result._output("echo", "word") == "word"


def test_the_envelope_has_everything(tmp_path: Path) -> None:
    path = tmp_path / "made" / "codec.json"
    result.write(path, "codec", {"load": {}}, [{"round": 1}], {"raw": {"top1": 1.0}})
    envelope = json.loads(path.read_text())
    assert envelope.keys() == {"schema", "measure", "command", "environment", "samples", "summary"}
    assert envelope["schema"] == "isthmus.measure/1"
    assert envelope["command"][0] == "isthmus"
    assert envelope["samples"] == [{"round": 1}]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"cannot write {tmp_path}"):
        result.write(tmp_path, "codec", {}, [], {})
