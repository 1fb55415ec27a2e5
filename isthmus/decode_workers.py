"""The decode workers of one host: one in this process, or one process for each NUMA node under this one."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec
import structlog

from cpu_decode import numa, service
from isthmus.children import describe, die_with_parent, terminate_as_interrupt
from transfer.config import Cluster, Decode, dump
from transfer.errors import EngineError

log = structlog.get_logger()

PORTS_STEP = 10
POLL_S = 0.2
# A worker that dies is started again, unless it and its siblings have died so often in so short a time.
MAX_DEATHS, DEATHS_WITHIN_S = 3, 600.0
# For what comes after draining.
GRACE_S = 20.0


def run(cluster: Cluster) -> None:
    """Serve until SIGTERM or SIGINT, on the NUMA nodes that ``[decode] numa`` asks for.

    Raises what :func:`cpu_decode.service.run` raises, and :class:`EngineError` if workers of several die again and
    again.
    """
    nodes = numa.choose(cluster.decode.numa, numa.read_topology())
    if len(nodes) > 1:
        with tempfile.TemporaryDirectory(prefix="isthmus-decode-") as folder, terminate_as_interrupt():
            commands = [command(cluster, node, index, Path(folder)) for index, node in enumerate(nodes)]
            supervise(commands, cluster.decode.drain_s + GRACE_S)
    else:
        service.run(cluster, nodes[0] if nodes else None)


def command(cluster: Cluster, node: numa.Node, index: int, folder: Path) -> list[str]:
    """The command of worker ``index``, bound to ``node``; its cluster file is written to ``folder``."""
    config = folder / f"worker-{index}.toml"
    decode = msgspec.structs.replace(with_ports(cluster.decode, index), numa=node.number)
    config.write_bytes(dump(msgspec.structs.replace(cluster, decode=decode)))
    return [sys.executable, "-P", "-m", "isthmus", "decode", "--config", str(config)]


def with_ports(decode: Decode, index: int) -> Decode:
    """``decode`` with the ports of worker ``index``; 0 stays any free port."""
    ports = {name: getattr(decode, name) for name in ("control_port", "kv_port", "kv_control_port")}
    return msgspec.structs.replace(decode, **{name: port and port + PORTS_STEP * index for name, port in ports.items()})


def supervise(commands: Sequence[Sequence[str]], grace_s: float) -> None:
    """Run a process for each command until ``KeyboardInterrupt``, and again when it dies; each ends in ``grace_s``.

    Raises :class:`EngineError` after ``MAX_DEATHS`` deaths within ``DEATHS_WITHIN_S``, or when one will not start
    because of its configuration. Leaves no process behind.
    """
    deaths: deque[float] = deque(maxlen=MAX_DEATHS)
    workers: list[subprocess.Popen[bytes]] = []
    try:
        workers += map(_spawn, commands)
        while True:
            time.sleep(POLL_S)
            for index, worker in enumerate(workers):
                if worker.poll() is None:
                    continue
                deaths.append(time.monotonic())
                how = f"decode worker {index} died with {describe(worker.returncode)}"
                if worker.returncode == 2:
                    raise EngineError(f"{how}: its configuration cannot be served, see above")
                if len(deaths) == MAX_DEATHS and deaths[-1] - deaths[0] < DEATHS_WITHIN_S:
                    raise EngineError(f"{how}, death {MAX_DEATHS} within {DEATHS_WITHIN_S:.0f} s")
                log.error(f"{how}; starting it again")
                workers[index] = _spawn(commands[index])
    except KeyboardInterrupt:
        log.info("ending the decode workers")
    finally:
        _end(workers, grace_s)


def _spawn(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)  # noqa: S603 ours


def _end(workers: Sequence[subprocess.Popen[bytes]], grace_s: float) -> None:
    """SIGTERM to all, time to finish, SIGKILL to the rest, also when a second Ctrl-C cuts the time short."""
    try:
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
        deadline_s = time.monotonic() + grace_s
        for worker in workers:
            worker.wait(max(0.0, deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        log.warning("a decode worker would not end in time")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
