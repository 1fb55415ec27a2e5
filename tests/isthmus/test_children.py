"""Small real processes instead of nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from isthmus.children import Child, Children, ChildView
from transfer.errors import EngineError

# A parent with a child of its own, as vLLM has: both ids go into a file, and both then sleep.
FAMILY = """
import os, subprocess, sys, time
grandchild = subprocess.Popen([sys.executable, "-c", {grandchild!r}])
with open({pids!r} + ".part", "w") as file:
    file.write(f"{{os.getpid()}} {{grandchild.pid}}")
os.rename({pids!r} + ".part", {pids!r})
time.sleep(600)
"""
SLEEP = "import time; time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def python(name: str, program: str, is_healthy: Callable[[], bool] = lambda: True) -> Child:
    return Child(name=name, command=[sys.executable, "-c", program], is_healthy=is_healthy)


def family(pids: Path, grandchild: str = SLEEP) -> Child:
    return python("family", FAMILY.format(pids=str(pids), grandchild=grandchild), pids.exists)


def running(pids: Path) -> list[int]:
    processes = [psutil.Process(pid) for pid in map(int, pids.read_text().split()) if psutil.pid_exists(pid)]
    return [process.pid for process in processes if process.status() != psutil.STATUS_ZOMBIE]


def eventually(holds: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.05)
    return holds()


def start(children: list[Child], log_dir: Path, *, deadline_s: float = 30, grace_s: float = 5) -> Children:
    running_children = Children(children, log_dir, start_deadline_s=deadline_s, grace_s=grace_s)
    try:
        running_children.start(lambda _: None)
    except BaseException:
        running_children.stop()
        raise
    return running_children


def test_leaving_ends_grandchildren_too(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with start([family(pids)], tmp_path):
        assert len(running(pids)) == 2
    assert running(pids) == []


def test_what_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with start([family(pids, STUBBORN)], tmp_path, grace_s=0.5):
        assert len(running(pids)) == 2
    assert running(pids) == []


def test_a_child_that_dies_while_starting_is_named_with_code_and_last_lines(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    last_words = "import sys; [print('line', i) for i in range(50)]; sys.exit(7)"
    with pytest.raises(EngineError) as failure:
        start([family(pids), python("doomed", last_words, lambda: False)], tmp_path)
    lines = str(failure.value).splitlines()
    assert lines[0] == "doomed died with exit code 7; its last lines:"
    assert lines[1:] == [f"line {i}" for i in range(30, 50)]
    assert not pids.exists() or running(pids) == []


def test_a_child_that_dies_later_ends_the_wait(tmp_path: Path) -> None:
    began = tmp_path / "began"
    with (
        start(
            [
                python("steady", SLEEP),
                python("victim", f"import pathlib, time; pathlib.Path({str(began)!r}).touch(); {SLEEP}", began.exists),
            ],
            tmp_path,
        ) as children,
        pytest.raises(EngineError, match="victim died with signal SIGKILL"),
    ):
        children._processes["victim"].kill()
        children.wait()


def test_a_child_that_never_gets_healthy_is_named_at_the_deadline(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    sick = python("sick", f"print('still loading', flush=True); {SLEEP}", lambda: False)
    with pytest.raises(EngineError, match=r"(?s)sick was not healthy after 1 s.*still loading"):
        start([family(pids), sick], tmp_path, deadline_s=1)
    assert not pids.exists() or running(pids) == []


def test_a_command_that_does_not_exist_leaves_no_process(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(FileNotFoundError):
        start([family(pids), Child(name="none", command=["/no/such/command"], is_healthy=lambda: True)], tmp_path)
    assert not pids.exists() or running(pids) == []


def test_the_display_sees_each_child_become_healthy(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    seen: list[list[ChildView]] = []
    with Children(
        [
            python(
                "slow", f"import pathlib; print('hello'); pathlib.Path({str(ready)!r}).touch(); {SLEEP}", ready.exists
            )
        ],
        tmp_path,
        start_deadline_s=30,
        grace_s=5,
    ) as children:
        children.start(seen.append)
    assert seen[-1][0].healthy
    assert seen[-1][0].last_line == "hello"


SUPERVISOR = """
import sys
from pathlib import Path
from isthmus.children import Child, Children, terminate_as_interrupt

pids, log_dir = Path(sys.argv[1]), Path(sys.argv[2])
child = Child(name="family", command=[sys.executable, "-c", sys.argv[3]], is_healthy=pids.exists)
try:
    with terminate_as_interrupt(), Children([child], log_dir, start_deadline_s=30, grace_s=5) as children:
        children.start(lambda views: None)
        print("up", flush=True)
        children.wait()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_survives_a_signal_to_the_supervisor(number: signal.Signals, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    program = FAMILY.format(pids=str(pids), grandchild=SLEEP)
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(pids), str(tmp_path), program], stdout=subprocess.PIPE, text=True
    ) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == "up\n"
        parent, grandchild = map(int, pids.read_text().split())
        os.kill(supervisor.pid, number)
        rest = supervisor.stdout.read()
    if number == signal.SIGKILL:
        # Nobody is left to end the group, but the child itself hears that its parent died.
        assert eventually(lambda: parent not in running(pids))
        os.kill(grandchild, signal.SIGKILL)
    else:
        assert rest == "interrupted\n"
        assert running(pids) == []


def test_a_child_starts_when_the_one_it_comes_after_is_healthy(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    # The second fails at once unless the first has got healthy before.
    children = [
        Child(
            name="second",
            command=[
                sys.executable,
                "-c",
                f"import pathlib, time; pathlib.Path({str(first)!r}).stat(); "
                f"pathlib.Path({str(second)!r}).touch(); time.sleep(60)",
            ],
            is_healthy=second.exists,
            after="first",
        ),
        Child(
            name="first",
            command=[
                sys.executable,
                "-c",
                f"import pathlib, time; time.sleep(0.5); pathlib.Path({str(first)!r}).touch(); time.sleep(60)",
            ],
            is_healthy=first.exists,
        ),
    ]
    lines: list[str] = []
    with Children(children, tmp_path, start_deadline_s=20, grace_s=5) as running:
        running.start(lambda views: lines.extend(view.last_line for view in views))
        running.require_alive()
    assert "waits for first" in lines
