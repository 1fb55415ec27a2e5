from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from isthmus.cli import cli
from isthmus.output_file import OutputFile


def convert(path: Path, *suffixes: str) -> Path:
    return OutputFile(*suffixes).convert(str(path), None, None)


def refused(path: Path, *suffixes: str) -> str:
    with pytest.raises(click.UsageError) as error:
        convert(path, *suffixes)
    return error.value.message


def test_a_file_may_be_there_or_not_and_its_folders_too(tmp_path):
    there = tmp_path / "there.json"
    there.write_text("before")
    for path in (there, tmp_path / "new.json", tmp_path / "some" / "folders" / "new.json"):
        assert convert(path) == path
    assert there.read_text() == "before"
    assert list(tmp_path.iterdir()) == [there]


def test_what_cannot_be_a_file_is_refused(tmp_path):
    a_file = tmp_path / "file"
    a_file.touch()
    assert refused(tmp_path) == f"File {str(tmp_path)!r} is a directory."
    assert refused(a_file / "result.json") == f"nothing can be written to {str(a_file)!r}: Not a directory."


def test_a_folder_that_nobody_may_write_to_is_refused():
    # Not even root may.
    assert refused(Path("/proc/result.json")).startswith("nothing can be written to '/proc': ")


def test_the_ending_of_a_picture_is_its_format(tmp_path):
    assert convert(tmp_path / "curves.PNG", ".png", ".svg") == tmp_path / "curves.PNG"
    assert refused(tmp_path / "curves", ".png", ".svg").endswith("curves' does not end in .png or .svg.")


@pytest.mark.parametrize("option", ["--json", "--plot", "--tune"])
def test_a_measurement_of_an_hour_does_not_begin_in_vain(option, tmp_path):
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(cli, ["measure", "decode", "--gguf", "no-such.gguf", *arguments])

    result = run(option, str(tmp_path))
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.stderr
    assert "no-such.gguf" not in result.stderr
