from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from transfer import notify


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(str(tmp_path / "notify"))
        inbox.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield inbox


def received(inbox: socket.socket) -> list[bytes]:
    states = []
    while True:
        try:
            states.append(inbox.recv(64))
        except BlockingIOError:
            return states


def test_the_first_sign_of_life_is_readiness_and_the_next_feed_the_watchdog(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ns = 5_000_000_000
    monkeypatch.setattr(notify.time, "monotonic_ns", lambda: now_ns)
    supervisor = notify.Supervisor()
    for later_ns in (0, 1, 999_999_999, 1_000_000_000, 1_500_000_000, 2_000_000_000):
        now_ns = 5_000_000_000 + later_ns
        supervisor.alive()
    assert received(systemd) == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]


def test_the_abstract_namespace_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind("\0isthmus-test-notify")
        inbox.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", "@isthmus-test-notify")
        notify.Supervisor().alive()
        assert received(inbox) == [b"READY=1"]


def test_without_systemd_nothing_is_sent(systemd: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET")
    supervisor = notify.Supervisor()
    supervisor.alive()
    assert not supervisor.listens
    assert received(systemd) == []
