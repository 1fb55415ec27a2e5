"""Copies what ansible-playbook prints as it comes, and adds at the end where the time went, by play and role."""

from __future__ import annotations

import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

TITLE = re.compile(r"^(?P<kind>PLAY|TASK|RUNNING HANDLER) \[(?:(?P<role>\w+) : )?(?P<name>.*)\] \**$")


def spent(lines: Iterable[str], now_s: Callable[[], float]) -> dict[tuple[str, str], float]:
    """Seconds by play and role, "" for tasks of no role; prints each line of ``lines`` as it comes."""
    found_s: defaultdict[tuple[str, str], float] = defaultdict(float)
    key, since_s = ("", ""), now_s()
    for line in lines:
        sys.stdout.write(line)
        if title := TITLE.match(line):
            at_s = now_s()
            found_s[key] += at_s - since_s
            play = title["name"] if title["kind"] == "PLAY" else key[0]
            key, since_s = (play, title["role"] or ""), at_s
    found_s[key] += now_s() - since_s
    return found_s


def table(spent_s: dict[tuple[str, str], float]) -> str:
    """A line for each that took half a second or more, and the sum of all."""
    lines = [
        f"{seconds:6.0f} s  {play}{f' / {role}' if role else ''}"
        for (play, role), seconds in spent_s.items()
        if seconds >= 0.5
    ]
    return "\n".join([*lines, f"{sum(spent_s.values()):6.0f} s  in all"]) + "\n"


if __name__ == "__main__":
    made = table(spent(sys.stdin, time.monotonic))
    Path(sys.argv[1]).write_text(made)
    sys.stdout.write(made)
