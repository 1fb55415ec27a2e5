from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import structlog
from click.testing import CliRunner

from isthmus.cli import cli, main
from transfer.errors import ConfigError, EngineError, IsthmusError, LinkError, RequestError


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """``main`` points structlog at this test's stderr, which is closed when the test is over."""
    yield
    structlog.reset_defaults()


def subcommands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [path]
    for name, command in group.commands.items():
        found += subcommands(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)]
    return found


def run(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "isthmus", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | env,
        check=False,
        timeout=60,
    )


def test_subcommands_are_those_that_are_documented() -> None:
    assert {" ".join(path) for path in subcommands(cli)} == {
        "",
        "api-key",
        "api-key make",
        "up",
        "prefill",
        "decode",
        "proxy",
        "pair",
        "pair make",
        "pair check",
        "pair plan",
        "pair fidelity",
        "keys",
        "keys make",
        "keys list",
        "demo",
        "doctor",
        "measure",
        "measure fidelity",
        "measure report",
        "measure ledger",
        "measure advise",
        "measure codec",
        "measure decode",
        "measure decode-sizes",
        "measure link",
        "measure crossover",
        "measure memory",
        "measure proxy",
        "measure pool",
        "measure prefill",
        "pool",
        "pool ls",
        "pool purge",
        "pool stats",
        "pool verify",
        "top",
        "version",
    }


@pytest.mark.parametrize("path", subcommands(cli), ids=" ".join)
def test_help_describes_every_command_and_option(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli, [*path, "--help"])
    assert result.exit_code == 0
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    assert command.help
    for parameter in command.params:
        assert not isinstance(parameter, click.Option) or parameter.help, f"{parameter.name} has no help"


@pytest.mark.parametrize("node", ["up", "prefill", "decode", "proxy"])
def test_a_missing_cluster_file_is_one_line_and_exit_2(node: str, tmp_path: Path) -> None:
    result = run(node, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "isthmus: cannot read isthmus.toml: No such file or directory\n"
    assert result.stdout == ""


def test_a_wrong_key_in_the_cluster_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[pair]\nname = "m"\nhf_dir = "h"\ngguf = "g"\ncolour = "red"\n')
    result = run("proxy", "--config", "c.toml", cwd=tmp_path)
    assert result.returncode == 2
    assert "colour" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("node", ["prefill", "decode", "proxy"])
def test_a_node_that_seals_without_keys_does_not_start(node: str, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "m.gguf").touch()
    (tmp_path / "c.toml").write_text('[pair]\nname = "m"\nhf_dir = "hf"\ngguf = "m.gguf"\n')
    result = run(node, "--config", "c.toml", cwd=tmp_path)
    assert result.returncode == 2
    assert "isthmus keys make" in result.stderr.splitlines()[-1]
    (tmp_path / "c.toml").write_text((tmp_path / "c.toml").read_text() + '[keys]\ndir = "keys"\n')
    result = run(node, "--config", "c.toml", cwd=tmp_path)
    assert result.returncode == 2
    assert f"there is no key {tmp_path / 'keys' / node}.key_secret" in result.stderr.splitlines()[-1]


def test_a_wrong_log_level_is_a_config_error() -> None:
    result = run("version", ISTHMUS_LOG="loud")
    assert result.returncode == 2
    assert result.stderr.startswith("isthmus: ISTHMUS_LOG is 'loud'")


def test_usage_errors_exit_2() -> None:
    assert run("demo", "--codec", "zip").returncode == 2
    assert run("no-such-command").returncode == 2


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(ConfigError("x"), 2), (RequestError("x"), 2), (EngineError("x"), 1), (LinkError("x"), 1)],
)
def test_exit_code_of_each_error(
    error: IsthmusError, exit_code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr("isthmus.cli.cli", fail)
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == exit_code
    assert capsys.readouterr().err == "isthmus: x\n"


def test_version_names_isthmus_first() -> None:
    result = CliRunner().invoke(cli, ["version"])
    assert result.output.splitlines()[0].startswith("isthmus ")


def test_the_command_imports_no_engine_before_it_needs_one() -> None:
    program = (
        "import sys, isthmus.cli; print(sorted({'torch', 'vllm', 'llama_cpp', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "[]\n"
