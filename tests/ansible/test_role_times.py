from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "ansible" / "testbed" / "role_times.py"
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


def test_time_goes_to_the_play_and_role_that_were_running(tmp_path: Path) -> None:
    out = tmp_path / "times"
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdin and reader.stdout
        for line in SAID.splitlines(keepends=True):
            reader.stdin.write(line)
            reader.stdin.flush()
            if "base :" in line or "HANDLER" in line:
                time.sleep(0.6)
        reader.stdin.close()
        copied = reader.stdout.read()
    assert reader.returncode == 0
    assert copied == SAID + out.read_text()
    assert re.findall(r"\d+ s  (.*)", out.read_text()) == [
        "Lay the ground / base",
        "Run the proxy / base",
        "Run the proxy / proxy",
        "in all",
    ]
