"""Two network namespaces joined by a veth that is shaped to 10 Gbit/s: a link like the real one, on one host."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from transfer.errors import ConfigError, EngineError

MTU_BYTES = 9000
# The line of a token bucket that gives a 10 Gbit/s link: a millisecond's worth of burst, 20 ms of queue.
SHAPE = ("tbf", "rate", "10gbit", "burst", "1250000", "latency", "20ms")
COMMAND_S = 20


class Ends(NamedTuple):
    """Names of the namespaces, and the address of the second in the net that both share."""

    sending: str
    receiving: str
    receiving_host: str


def require() -> None:
    """Raise :class:`ConfigError` that names what this host lacks for a shaped link, if it lacks something."""
    if os.geteuid() != 0:
        raise ConfigError("--shaped makes network namespaces, which needs root: run it with sudo")
    for program, package in (("ip", "iproute2"), ("tc", "iproute2"), ("iperf3", "iperf3")):
        if shutil.which(program) is None:
            raise ConfigError(f"--shaped needs {program}: install the package {package}")


@contextmanager
def shaped_link() -> Iterator[Ends]:
    """Make both namespaces and remove them whatever happens.

    Raises what :func:`require` raises, and :class:`EngineError` with the kernel's answer if it makes no such link.
    """
    require()
    # The process id keeps two runs apart.
    ends = Ends(f"isthmus-a-{os.getpid()}", f"isthmus-b-{os.getpid()}", "10.111.0.2")
    devices = {ends.sending: ("isthmus0", "10.111.0.1"), ends.receiving: ("isthmus1", ends.receiving_host)}
    with ExitStack() as stack:
        # A SIGTERM (of `timeout`, for instance) unwinds as Ctrl-C does.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        stack.callback(signal.signal, signal.SIGTERM, before)
        for name in devices:
            _do("ip", "netns", "add", name)
            # Its end of the veth, and with it the other one, goes with the namespace.
            stack.callback(_do, "ip", "netns", "del", name)
        (a, (device_a, _)), (b, (device_b, _)) = devices.items()
        _do("ip", "link", "add", device_a, "netns", a, "type", "veth", "peer", "name", device_b, "netns", b)
        for name, (device, address) in devices.items():
            inside = ("ip", "-n", name)
            _do(*inside, "address", "add", f"{address}/24", "dev", device)
            _do(*inside, "link", "set", "lo", "up")
            _do(*inside, "link", "set", device, "mtu", str(MTU_BYTES), "up")
            _do("tc", "-n", name, "qdisc", "add", "dev", device, "root", *SHAPE)
        yield ends


def inside(namespace: str, *command: str) -> list[str]:
    """``command`` as one that runs in ``namespace``."""
    return ["ip", "netns", "exec", namespace, *command]


def _do(*command: str) -> None:
    try:
        done = subprocess.run(  # noqa: S603 - constant commands
            command, capture_output=True, text=True, check=False, timeout=COMMAND_S
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"`{' '.join(command)}` did not end within {COMMAND_S} s") from None
    if done.returncode:
        raise EngineError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
