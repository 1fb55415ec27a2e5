"""Child processes that start together, are healthy together and end together, however that comes about."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import msgspec
import psutil

from transfer.errors import EngineError

POLL_S = 0.2
STOP_POLL_S = 0.05
KILL_S = 5.0
TAIL_LINES = 20
TAIL_BYTES = 16 << 10
PR_SET_PDEATHSIG = 1  # linux/prctl.h

_libc = ctypes.CDLL(None)


class Child(msgspec.Struct, frozen=True, kw_only=True):
    """One process to run, once the child called ``after`` is healthy.

    ``is_healthy`` is asked every ``POLL_S`` and must answer within about a second.
    """

    name: str
    command: Sequence[str]
    is_healthy: Callable[[], bool]
    after: str | None = None


class ChildView(msgspec.Struct, frozen=True, kw_only=True):
    """How one child is doing, for a display."""

    name: str
    healthy: bool
    seconds: float
    last_line: str


class Children:
    """Runs ``children`` in process groups of their own, each with its output in ``log_dir/NAME.log``.

    Usable once, as a context manager: leaving it ends every process that any child has started in its group.
    """

    def __init__(self, children: Sequence[Child], log_dir: Path, *, start_deadline_s: float, grace_s: float) -> None:
        self._children = children
        self._log_dir = log_dir
        self._start_deadline_s = start_deadline_s
        self._grace_s = grace_s
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._healthy_after_s: dict[str, float] = {}
        self._began_ns = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, show: Callable[[list[ChildView]], None]) -> None:
        """Start every child and return when all are healthy; ``show`` is called at every look.

        Raises :class:`EngineError` when one dies or the deadline passes.
        """
        self._began_ns = time.monotonic_ns()
        while len(self._healthy_after_s) < len(self._children):
            self.require_alive()
            for child in self._children:
                if child.name not in self._processes:
                    if child.after is None or child.after in self._healthy_after_s:
                        self._processes[child.name] = self._spawn(child)
                elif child.name not in self._healthy_after_s and child.is_healthy():
                    self._healthy_after_s[child.name] = self._elapsed_s()
            show(self._views())
            self._require_in_time()
            time.sleep(POLL_S)
        self.require_alive()

    def wait(self) -> None:
        """Block until a child dies, which is an :class:`EngineError`; a signal ends it as ``KeyboardInterrupt``."""
        while True:
            self.require_alive()
            time.sleep(POLL_S)

    def require_alive(self) -> None:
        """Raise :class:`EngineError` with exit code and last lines of the first child that has died."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise EngineError(
                    f"{name} died with {describe(process.returncode)}; its last lines:\n{self._tail(name)}"
                )

    def stop(self) -> None:
        """End all children: SIGTERM, ``grace_s`` to leave in order, then SIGKILL to what is left of their groups."""
        try:
            self._terminate()
        finally:
            # Also on the way out of a second Ctrl-C: the impatient get their prompt back, and no orphans.
            for process in self._processes.values():
                _signal_group(process, signal.SIGKILL)
                process.wait()
            deadline_ns = _in(KILL_S)
            while time.monotonic_ns() < deadline_ns and any(map(_group_lives, self._processes.values())):
                time.sleep(STOP_POLL_S)

    def _terminate(self) -> None:
        leaders = list(self._processes.values())
        for leader in leaders:
            if leader.poll() is None:
                leader.terminate()
        deadline_ns = _in(self._grace_s)
        while time.monotonic_ns() < deadline_ns and any(map(_group_lives, self._processes.values())):
            for leader in [leader for leader in leaders if leader.poll() is not None]:
                # What a child leaves behind is told only now: it must not vanish under one that ends in order.
                _signal_group(leader, signal.SIGTERM)
                leaders.remove(leader)
            time.sleep(STOP_POLL_S)

    def _spawn(self, child: Child) -> subprocess.Popen[bytes]:
        with self._log(child.name).open("wb") as log:
            return subprocess.Popen(  # noqa: S603 the command is ours
                child.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def _require_in_time(self) -> None:
        if self._elapsed_s() > self._start_deadline_s and len(self._healthy_after_s) < len(self._children):
            late = next(name for name in self._processes if name not in self._healthy_after_s)
            raise EngineError(
                f"{late} was not healthy after {self._start_deadline_s:.0f} s; its last lines:\n{self._tail(late)}"
            )

    def _views(self) -> list[ChildView]:
        return [
            ChildView(
                name=child.name,
                healthy=child.name in self._healthy_after_s,
                seconds=self._healthy_after_s.get(child.name, self._elapsed_s()),
                last_line=self._tail(child.name, 1) if child.name in self._processes else f"waits for {child.after}",
            )
            for child in self._children
        ]

    def _elapsed_s(self) -> float:
        return (time.monotonic_ns() - self._began_ns) / 1e9

    def _log(self, name: str) -> Path:
        return self._log_dir / f"{name}.log"

    def _tail(self, name: str, num_lines: int = TAIL_LINES) -> str:
        with self._log(name).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join([line for line in lines if line.strip()][-num_lines:])


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind the body as Ctrl-C does, so that children are ended on either."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def die_with_parent() -> None:
    """Runs in a child before exec: a parent that is killed outright cannot end its children itself."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    """Whether any process of the child's group still runs; zombies, which only wait to be reaped, do not count."""
    process.poll()
    for other in psutil.process_iter():
        try:
            if os.getpgid(other.pid) == process.pid and other.status() != psutil.STATUS_ZOMBIE:
                return True
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return False


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _in(seconds: float) -> int:
    return time.monotonic_ns() + int(seconds * 1e9)


def describe(exit_code: int) -> str:
    """How a process ended, in words."""
    return f"signal {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}"
