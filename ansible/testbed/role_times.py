"""Copies what ansible-playbook prints as it comes, and adds at the end where the time went, by play and role."""

from __future__ import annotations

import re
import sys
import time
from collections import defaultdict
from pathlib import Path

TITLE = re.compile(r"^(?P<kind>PLAY|TASK|RUNNING HANDLER) \[(?:(?P<role>\w+) : )?(?P<name>.*)\] \**$")


def main(out: Path) -> None:
    """Read the play's output from standard input; the table goes to standard output and to ``out``."""
    spent_s: defaultdict[tuple[str, str], float] = defaultdict(float)
    key, since_s = ("", ""), time.monotonic()
    for line in sys.stdin:
        sys.stdout.write(line)
        if title := TITLE.match(line):
            now_s = time.monotonic()
            spent_s[key] += now_s - since_s
            play = title["name"] if title["kind"] == "PLAY" else key[0]
            key, since_s = (play, title["role"] or ""), now_s
    spent_s[key] += time.monotonic() - since_s
    lines = [
        f"{seconds:6.0f} s  {play}{f' / {role}' if role else ''}"
        for (play, role), seconds in spent_s.items()
        if seconds >= 0.5
    ]
    out.write_text("\n".join([*lines, f"{sum(spent_s.values()):6.0f} s  in all"]) + "\n")
    sys.stdout.write(out.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
