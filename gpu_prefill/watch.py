"""Tells systemd how vLLM does: a process beside vLLM's, which is not ours to change."""

from __future__ import annotations

import sys
import time

import httpx

from transfer.notify import Supervisor

POLL_S = 1.0
ANSWER_S = 5.0


def watch(url: str, supervisor: Supervisor) -> None:
    """Ask ``url`` every second, for ever; each 200 counts as a sign of life. systemd ends this with the unit."""
    with httpx.Client(timeout=ANSWER_S, trust_env=False) as http:
        while True:
            if answers(http, url):
                supervisor.alive()
            time.sleep(POLL_S)


def answers(http: httpx.Client, url: str) -> bool:
    """Whether ``url`` answers 2xx now."""
    try:
        return http.get(url).is_success
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    watch(sys.argv[1], Supervisor())
