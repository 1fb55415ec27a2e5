from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from isthmus.cli import cli
from isthmus.keys import describe, make
from transfer import keys
from transfer.errors import ConfigError


def invoke(*arguments: str) -> list[str]:
    result = CliRunner().invoke(cli, ["keys", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output.splitlines()


def test_says_which_host_needs_which_files(tmp_path: Path) -> None:
    lines = invoke("make", str(tmp_path / "k"), "--client", "prefill-2")
    assert lines[0] == f"made decode, prefill, proxy, prefill-2 in {tmp_path / 'k'}"
    assert "hosts of decode workers need decode.key_secret, prefill-2.key, prefill.key, proxy.key" in lines
    assert "the host of prefill-2 needs prefill-2.key_secret, decode.key" in lines
    assert "the host of proxy needs proxy.key_secret, decode.key" in lines


def test_the_files_of_each_host_are_enough(tmp_path: Path) -> None:
    made = tmp_path / "k"
    for line in invoke("make", str(made), "--client", "proxy-east"):
        if " need" not in line:
            continue
        who, _, files = line.partition(" need")
        host = tmp_path / who.replace(" ", "-")
        host.mkdir()
        for name in files.removeprefix("s").strip().split(", "):
            (host / name).write_bytes((made / name).read_bytes())
            (host / name).chmod(0o600)
    server = keys.server(tmp_path / "hosts-of-decode-workers")
    assert set(server.allowed["proxy"].values()) == {"proxy", "proxy-east"}
    for role, name in (("prefill", "prefill"), ("proxy", "proxy"), ("proxy", "proxy-east")):
        client = keys.client(tmp_path / f"the-host-of-{name}", role)
        assert client.server == server.public
        assert server.allowed[role][client.public] == name


def test_making_again_changes_nothing(tmp_path: Path) -> None:
    invoke("make", str(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert invoke("make", str(tmp_path))[0] == f"{tmp_path} has all of these keys already"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_lists_public_keys_only(tmp_path: Path) -> None:
    list(make(tmp_path, ("proxy-east",)))
    (tmp_path / "proxy-east.key_secret").unlink()
    lines = invoke("list", str(tmp_path))
    assert [line.split("  ")[1] for line in lines] == [
        "decode: identifies the decode workers",
        "prefill: may send KV to them",
        "proxy-east: may ask them for tokens; its secret is not here",
        "proxy: may ask them for tokens",
    ]
    assert keys.client(tmp_path, "proxy").public.decode() in lines[-1]
    assert not any(keys.client(tmp_path, "proxy").secret.decode() in line for line in lines)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="isthmus keys make"):
        list(describe(tmp_path / "absent"))
