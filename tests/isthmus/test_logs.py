"""What the log shows of a failure."""

from __future__ import annotations

import sys

import pytest
import structlog

from isthmus import logs


@pytest.mark.parametrize("terminal", [True, False])
def test_a_traceback_shows_no_values(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    logs.configure()
    secret = "xyzzy"
    try:
        _fail_with(secret)
    except RuntimeError:
        structlog.get_logger().exception("it failed")
    finally:
        structlog.reset_defaults()
    written = capsys.readouterr().err
    assert "_fail_with" in written
    assert secret not in written


def _fail_with(prompt: str) -> None:
    raise RuntimeError(f"a prompt of {len(prompt)} letters")
