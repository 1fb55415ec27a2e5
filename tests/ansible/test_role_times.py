from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROLE_TIMES = runpy.run_path(str(Path(__file__).parents[2] / "ansible" / "testbed" / "role_times.py"))
SAID = """
PLAY [Lay the ground] *******

TASK [Gathering Facts] ******
ok: [gpu1]

TASK [base : Install packages] ****
ok: [gpu1]

PLAY [Run the proxy] ****
TASK [base : Make the environment] ***
RUNNING HANDLER [proxy : Restart proxy] **
changed: [xeon1]
"""


def test_time_goes_to_the_play_and_role_that_were_running(capsys: pytest.CaptureFixture[str]) -> None:
    # At the beginning, at each of the six titles, and at the end.
    clock = iter([0.0, 0.1, 0.2, 2.2, 5.2, 5.3, 9.3, 20.3])
    spent = ROLE_TIMES["spent"](SAID.splitlines(keepends=True), lambda: next(clock))
    assert capsys.readouterr().out == SAID
    assert spent["Lay the ground", "base"] == pytest.approx(3.0)
    assert ROLE_TIMES["table"](spent).splitlines() == [
        "     2 s  Lay the ground",
        "     3 s  Lay the ground / base",
        "     4 s  Run the proxy / base",
        "    11 s  Run the proxy / proxy",
        "    20 s  in all",
    ]
