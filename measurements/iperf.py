"""iperf3, both ends of it: what plain TCP does over a path."""

from __future__ import annotations

import json
import select
import shutil
import socket
import subprocess
from typing import IO, NamedTuple, cast

from transfer.errors import ConfigError, EngineError

START_S = 5.0
IDLE_S = 60
CLIENT_S = 120.0


class Stream(NamedTuple):
    """One TCP stream, as iperf3's receiver timed it, and the CPU time that iperf3 states for both ends."""

    num_bytes: int
    seconds: float
    sender_cpu_s: float
    receiver_cpu_s: float


def is_installed() -> bool:
    """Whether this host has iperf3."""
    return shutil.which("iperf3") is not None


class Server:
    """An iperf3 server on ``host`` for one client; it ends with that, or after a minute without one.

    Raises :class:`ConfigError` where iperf3 is not installed and :class:`EngineError` if it does not start.
    """

    def __init__(self, host: str) -> None:
        program = shutil.which("iperf3")
        if program is None:
            raise ConfigError("iperf3 is not installed on the serving host: install the package iperf3")
        with socket.socket() as probe:
            probe.bind((host, 0))
            self.port = int(probe.getsockname()[1])
        options = ["-s", "-1", "-B", host, "-p", str(self.port), "--idle-timeout", str(IDLE_S), "--forceflush"]
        self._process = subprocess.Popen(  # noqa: S603 - constant command
            [program, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        # Its first words come when it listens.
        said, _, _ = select.select([cast(IO[bytes], self._process.stdout)], [], [], START_S)
        if not said or self._process.poll() is not None:
            self.stop()
            raise EngineError(f"iperf3 does not listen on {host}:{self.port}")

    def stop(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.communicate()


def send(host: str, port: int, num_bytes: int) -> Stream:
    """Send ``num_bytes`` to a server; :class:`EngineError` with iperf3's words if that fails."""
    command = [shutil.which("iperf3") or "iperf3", "-c", host, "-p", str(port), "-n", str(num_bytes), "-J"]
    try:
        done = subprocess.run(  # noqa: S603 - constant command
            command, capture_output=True, text=True, check=False, timeout=CLIENT_S
        )
        report = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        raise EngineError(f"iperf3 has no result: {error}") from None
    if "error" in report:
        raise EngineError(f"iperf3: {report['error']}")
    received, cpu = report["end"]["sum_received"], report["end"]["cpu_utilization_percent"]
    seconds = float(received["seconds"])
    return Stream(
        int(received["bytes"]), seconds, cpu["host_total"] / 100 * seconds, cpu["remote_total"] / 100 * seconds
    )
