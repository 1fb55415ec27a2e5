"""Workers' command lines and ports, and small real processes in place of workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from structlog.testing import capture_logs

from cpu_decode.numa import Node
from isthmus import decode_workers
from transfer.config import Cluster, Decode, Link, Pair, dump, load, with_numa
from transfer.errors import ConfigError, EngineError

SECOND = Node(number=8, cores=((4,), (5,)), total_bytes=1, available_bytes=1, distances={0: 21, 8: 10})
# Ends in order when asked to, as a worker does.
SERVE = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); time.sleep(600)"
PARENT = """
import sys
from isthmus import decode_workers
from isthmus.children import terminate_as_interrupt
with terminate_as_interrupt():
    decode_workers.supervise([[sys.executable, "-c", {program!r}]] * 2, 10.0)
"""


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def children(pid: int) -> list[int]:
    return sorted(child.pid for child in psutil.Process(pid).children())


def eventually(found, seconds: float = 20):
    deadline = time.monotonic() + seconds
    while not (value := found()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return value


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    (tmp_path / "hf").mkdir()
    (tmp_path / "model.gguf").touch()
    return Cluster(
        pair=Pair(name="m", hf_dir=str(tmp_path / "hf"), gguf=str(tmp_path / "model.gguf")),
        decode=Decode(kv_port=0),
        link=Link(seal="none"),
    )


def test_each_worker_gets_its_node_and_ports_of_its_own(cluster: Cluster, tmp_path: Path) -> None:
    command = decode_workers.command(cluster, SECOND, 3, tmp_path)
    assert command[:-1] == [sys.executable, "-P", "-m", "isthmus", "decode", "--config"]
    decode = load(Path(command[-1])).decode
    assert (decode.numa, decode.control_port, decode.kv_control_port) == (8, 8132, 8134)
    assert decode.kv_port == 0


def test_the_first_worker_keeps_the_ports_of_the_file() -> None:
    assert decode_workers.with_ports(Decode(), 0) == Decode()


def test_numa_setting_of_the_command_line_is_checked(cluster: Cluster) -> None:
    assert with_numa(cluster, "2").decode.numa == 2
    assert with_numa(cluster, "off").decode.numa == "off"
    for wrong in ("-1", "all", "1.5", ""):
        with pytest.raises(ConfigError, match=f"'{wrong}' is neither a NUMA node's number nor auto nor off"):
            with_numa(cluster, wrong)


def test_a_node_in_the_file_may_be_a_number(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "isthmus.toml"
    file.write_bytes(dump(with_numa(cluster, "1")))
    assert load(file).decode.numa == 1
    file.write_text(file.read_text().replace("numa = 1", 'numa = "both"'))
    with pytest.raises(ConfigError, match=r"\$\.decode\.numa"):
        load(file)


def test_a_worker_that_dies_is_started_again_and_all_end_with_their_parent() -> None:
    with subprocess.Popen(python(PARENT.format(program=SERVE)), stderr=subprocess.PIPE) as parent:
        first = eventually(lambda: pair if len(pair := children(parent.pid)) == 2 else None)
        os.kill(first[0], signal.SIGKILL)
        second = eventually(lambda: pair if len(pair := children(parent.pid)) == 2 and pair != first else None)
        assert second and first[1] in second and first[0] not in second
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(20) == 0
    # One whose start the signal cut short ends by its own, once its parent is gone.
    assert eventually(lambda: not any(psutil.pid_exists(pid) for pid in second))


def test_workers_that_die_again_and_again_end_the_parent() -> None:
    before = psutil.Process().children()
    with capture_logs() as logs, pytest.raises(EngineError, match="died with exit code 1, death 3 within 600 s"):
        decode_workers.supervise([python("raise SystemExit(1)"), python(SERVE)], 10.0)
    assert len([entry for entry in logs if "starting it again" in entry["event"]]) == 2
    assert psutil.Process().children() == before


def test_a_worker_with_a_wrong_configuration_is_not_tried_again() -> None:
    before = psutil.Process().children()
    with pytest.raises(EngineError, match="decode worker 1 died with exit code 2: its configuration cannot be served"):
        decode_workers.supervise([python(SERVE), python("raise SystemExit(2)")], 10.0)
    assert psutil.Process().children() == before
