from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from transfer import keys
from transfer.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "made" / "keys"
    keys.make(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_pair_for_every_role_is_made(folder: Path) -> None:
    names = {f"{name}.{ending}" for name in ("decode", "prefill", "proxy") for ending in ("key", "key_secret")}
    assert contents(folder).keys() == names


def test_only_the_owner_reads_secrets(folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.glob("*.key_secret"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for path in folder.glob("*.key"):
        assert b"secret-key" not in path.read_bytes()


def test_what_exists_is_left_alone(folder: Path) -> None:
    before = contents(folder)
    assert keys.make(folder) == []
    assert keys.make(folder, ("proxy-east", "proxy-east", "proxy")) == ["proxy-east"]
    after = contents(folder)
    assert after.keys() - before.keys() == {"proxy-east.key", "proxy-east.key_secret"}
    assert {name: after[name] for name in before} == before


def test_a_public_key_whose_secret_is_elsewhere_is_not_replaced(folder: Path) -> None:
    (folder / "prefill.key_secret").unlink()
    before = contents(folder)
    assert keys.make(folder) == []
    assert contents(folder) == before


@pytest.mark.parametrize(
    "name", ["", "gateway", "decode-2", "Proxy", "proxy/../../x", "proxy-", "prefill_2", "proxy-é"]
)
def test_a_client_without_a_role_is_refused_before_anything_is_made(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prefill-SUFFIX or proxy-SUFFIX"):
        keys.make(tmp_path / "keys", ("prefill-2", name))
    assert not (tmp_path / "keys").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write keys to"):
        keys.make(tmp_path / "file" / "keys")


def test_both_ends_load_what_belongs_together(folder: Path) -> None:
    keys.make(folder, ("prefill-2",))
    server = keys.server(folder)
    prefill, proxy = keys.client(folder, "prefill"), keys.client(folder, "proxy")
    assert zmq.curve_public(server.secret) == server.public == prefill.server == proxy.server
    assert zmq.curve_public(prefill.secret) == prefill.public != proxy.public
    assert set(server.allowed["prefill"].values()) == {"prefill", "prefill-2"}
    assert server.allowed["prefill"][prefill.public] == "prefill"
    assert server.allowed["proxy"] == {proxy.public: "proxy"}


def test_a_host_with_one_secret_of_a_role_uses_it_under_any_name(folder: Path) -> None:
    keys.make(folder, ("prefill-2",))
    roles_own = keys.client(folder, "prefill")
    (folder / "prefill.key_secret").unlink()
    assert keys.client(folder, "prefill").public != roles_own.public
    keys.make(folder, ("prefill-3",))
    with pytest.raises(ConfigError, match="several prefill nodes"):
        keys.client(folder, "prefill")


def test_holders_say_whose_secret_is_here(folder: Path) -> None:
    (folder / "proxy.key_secret").unlink()
    (folder / "notes.key").write_text("not ours")
    assert [(holder.name, holder.has_secret) for holder in keys.holders(folder)] == [
        ("decode", True),
        ("prefill", True),
        ("proxy", False),
    ]


def rewrite(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(change((folder / name).read_text()))

    return damage


def swap_secrets(folder: Path) -> None:
    other = keys.client(folder, "proxy").secret.decode()
    mine = keys.client(folder, "prefill").secret.decode()
    rewrite("prefill.key_secret", lambda text: text.replace(mine, other))(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "prefill.key_secret").unlink(), "prefill.key_secret.*isthmus keys make"),
        (lambda folder: (folder / "decode.key").unlink(), "decode.key.*isthmus keys make"),
        (lambda folder: (folder / "prefill.key_secret").chmod(0o640), "prefill.key_secret can be read.*chmod 600"),
        (lambda folder: (folder / "prefill.key_secret").chmod(0o604), "prefill.key_secret can be read.*chmod 600"),
        (rewrite("prefill.key_secret", lambda _: ""), "prefill.key_secret is not a key"),
        (rewrite("prefill.key_secret", lambda text: text.split("secret-key")[0]), "holds no secret key"),
        (rewrite("prefill.key_secret", lambda text: text[:-10]), "does not belong"),
        (swap_secrets, "does not belong"),
        (rewrite("decode.key", lambda text: text[:-10]), "decode.key is not a key"),
        (rewrite("decode.key", lambda text: text[:-4] + '~~"\n'), "decode.key is not a key"),
        (lambda folder: (folder / "decode.key").write_bytes(bytes(range(256))), "decode.key is not a key"),
    ],
)
def test_a_client_is_told_which_file_is_wrong(damage: Callable[[Path], object], said: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=said):
        keys.client(folder, "prefill")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_told(folder: Path) -> None:
    (folder / "prefill.key_secret").chmod(0)
    with pytest.raises(ConfigError, match=r"cannot read key .*prefill.key_secret: Permission denied"):
        keys.client(folder, "prefill")


@pytest.mark.parametrize("role", ["prefill", "proxy"])
def test_a_worker_that_would_let_nobody_in_is_refused(role: str, folder: Path) -> None:
    (folder / f"{role}.key").unlink()
    with pytest.raises(ConfigError, match=rf"copy its {role}\.key there"):
        keys.server(folder)


def test_a_worker_is_told_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"decode\.key_secret.*isthmus keys make"):
        keys.server(tmp_path / "absent")
    rewrite("proxy.key", lambda _: "curve")(folder)
    with pytest.raises(ConfigError, match=r"proxy\.key is not a key"):
        keys.server(folder)
