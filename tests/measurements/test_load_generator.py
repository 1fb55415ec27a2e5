"""What is believed of a generator's run, and what becomes of one that dies, hangs or refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from measurements.load_generator import Ask, Generator, Target, arguments, read
from transfer.errors import EngineError

ASK = Ask(requests=2, concurrency=1, prompt_tokens=8, output_tokens=3)
# Shell that takes one run, to do something to it.
READY = "echo '{\"ready\": true}'; read line; "
TARGET = Target("http://127.0.0.1:1", "m", "/nowhere")


def saved(folder: Path, **changes: Any) -> Path:
    """A file as the generator leaves it, but for ``changes``."""
    good = {
        "start_times": [1.0, 2.0],
        "ttfts": [0.1, 0.2],
        "latencies": [0.3, 0.5],
        "itls": [[0.1, 0.1], [0.3]],
        "input_lens": [8, 8],
        "output_lens": [3, 3],
        "errors": ["", ""],
    }
    path = folder / "run.json"
    path.write_text(json.dumps(good | changes))
    return path


def test_requests_of_a_whole_run(tmp_path: Path) -> None:
    one, other = read(saved(tmp_path), ASK)
    assert (one.ttft_s, one.e2e_s, one.itl_s, one.output_tokens) == (0.1, 0.3, [0.1, 0.1], 3)
    assert other.tpot_s == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"errors": ["", "Traceback\nServerDisconnectedError"]}, "1 of 2 requests failed: ServerDisconnectedError"),
        ({"output_lens": [3, 2]}, "request 1 ended after 2 of 3 tokens"),
        ({"ttfts": [0.1, float("nan")]}, "request 1 has times that are no numbers"),
        ({"itls": [[0.1], [float("inf")]]}, "request 1 has times that are no numbers"),
        ({"latencies": [0.3, -0.5]}, "request 1 has times that are no numbers"),
        ({"ttfts": [0.1, 0.0]}, "its first token 0.000 s"),
        ({"ttfts": [0.1]}, "is no result of vllm bench serve: ValueError"),
        ({"itls": None}, "is no result of vllm bench serve: TypeError"),
    ],
)
def test_a_run_that_is_not_whole_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(EngineError, match=said):
        read(saved(tmp_path, **changes), ASK)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no result of vllm bench serve: FileNotFoundError"):
        read(tmp_path / "none.json", ASK)
    path = saved(tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(EngineError, match="no result of vllm bench serve: JSONDecodeError"):
        read(path, ASK)
    with pytest.raises(EngineError, match="reports 2 requests, not 3"):
        read(saved(tmp_path), ASK._replace(requests=3))


def test_the_command_line_has_what_is_asked() -> None:
    ask = ASK._replace(prompt_tokens=20, shared_tokens=15, headers=("X-A=1", "X-B=2"))
    argv = arguments(TARGET, ask, Path("/tmp/x.json"))
    given = dict(zip(argv[::2], argv[1::2], strict=False))
    assert (given["--random-prefix-len"], given["--random-input-len"]) == ("15", "5")
    assert argv[-3:] == ["--header", "X-A=1", "X-B=2"]


def fake_python(folder: Path, script: str) -> str:
    """An interpreter that runs ``script`` instead of the generator."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo no vllm here >&2; exit 1", "died: no vllm here"),
        (READY + "echo killed >&2; exit 9", "died: killed"),
        (READY + 'echo \'{"error": "SystemExit: 2"}\'; read line', "failed: SystemExit: 2"),
        (READY + "sleep 60", "was not done after"),
        (READY + "echo '{\"error\": null}'; read line", "no result of vllm bench serve"),
    ],
    ids=["does not start", "dies", "refuses", "hangs", "leaves nothing"],
)
def test_generators_that_fail(tmp_path: Path, script: str, said: str) -> None:
    # A file of an earlier run must not pass for this one's.
    path = saved(tmp_path)
    with Generator(tmp_path / "log", fake_python(tmp_path, script)) as generator:
        with pytest.raises(EngineError, match=said):
            generator.run(TARGET, ASK, path, deadline_s=0.5)
        assert not path.exists()


def test_a_generator_that_died_is_started_again(tmp_path: Path) -> None:
    python = fake_python(tmp_path, "echo x >> starts; echo '{\"ready\": true}'; read line; exit 1")
    with pytest.MonkeyPatch.context() as patch, Generator(tmp_path / "log", python) as generator:
        patch.chdir(tmp_path)
        for _ in range(2):
            with pytest.raises(EngineError, match="died"):
                generator.run(TARGET, ASK, tmp_path / "run.json", deadline_s=5)
    assert (tmp_path / "starts").read_text().split() == ["x", "x"]


def test_leaving_ends_the_process(tmp_path: Path) -> None:
    with Generator(tmp_path / "log", fake_python(tmp_path, "echo '{\"ready\": true}'; exec sleep 60")) as generator:
        process = generator._started()
        began = time.monotonic()
    assert process.returncode is not None
    assert time.monotonic() - began < 10
