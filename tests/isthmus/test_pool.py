"""``isthmus pool`` over a folder that a worker has left, or still uses; no worker runs."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from cpu_decode.pool import block_files
from cpu_decode.pool.block_log import BlockLog
from cpu_decode.pool.disk import DiskTier
from cpu_decode.pool.stored import HEADER_BYTES
from isthmus.cli import cli
from tests.cpu_decode.pool.stored_blocks import OTHER_SEED, SEED, block
from transfer.errors import CapacityError, ConfigError, LinkError
from transfer.messages import TierStatus

SIZE = 1000 + HEADER_BYTES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two parts: one with three blocks, one with a block of another model."""
    first, second = DiskTier(tmp_path, 1 << 20, SEED, BlockLog()), DiskTier(tmp_path, 1 << 20, OTHER_SEED, BlockLog())
    for number in range(3):
        first.put(block(number))
        os.utime(block_files.path_of(tmp_path / "0", block(number).name), (number, number))
    second.put(block(0, seed=OTHER_SEED))
    first.close()
    second.close()
    return tmp_path


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["pool", *map(str, arguments)])


def test_stats_sum_up_each_part(folder):
    rows = json.loads(invoke("stats", folder, "--json").output)
    assert [(row["blocks"], row["used_bytes"], row["in_use"], row["models"]) for row in rows] == [
        (3, 3 * SIZE, False, {SEED.hex(): 3}),
        (1, SIZE, False, {OTHER_SEED.hex(): 1}),
    ]
    assert "used bytes" in invoke("stats", folder).output


def test_ls_lists_the_last_used_first(folder):
    lines = [json.loads(line) for line in invoke("ls", folder, "--json").output.splitlines()]
    assert [(line["part"], line["start_token"], line["num_tokens"]) for line in lines] == [
        ("1", 0, 64),
        ("0", 128, 64),
        ("0", 64, 64),
        ("0", 0, 64),
    ]
    assert lines[1]["key"] == block(2).name.hex()[:32]
    plain = invoke("ls", folder).output.splitlines()
    assert len(plain) == 4
    assert "tokens 128-192" in plain[1]


def test_verify_finds_what_is_damaged_and_changes_nothing(folder):
    intact = invoke("verify", folder)
    assert (intact.exit_code, intact.output) == (0, "4 blocks are intact, 0 are not\n")
    path = block_files.path_of(folder / "0", block(1).name)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    torn = block_files.path_of(folder / "0", block(2).name)
    os.truncate(torn, 500)
    found = invoke("verify", folder)
    assert found.exit_code == 1
    assert f"{path}: the payload is not intact" in found.output
    assert f"{torn}: the file has 500 bytes" in found.output
    assert found.output.endswith("2 blocks are intact, 2 are not\n")
    assert json.loads(invoke("stats", folder, "--json").output)[0]["corrupt_headers"] == 1
    assert len(invoke("ls", folder).output.splitlines()) == 3


def test_purge_deletes_what_is_old_or_all(folder):
    assert invoke("purge", folder, "--older-than", 1).output.startswith("deleted 3 blocks")
    assert invoke("purge", folder).output.startswith("deleted 1 blocks")
    assert json.loads(invoke("stats", folder, "--json").output)[0]["blocks"] == 0


def test_purge_leaves_a_running_workers_part_alone(folder):
    running = DiskTier(folder, 1 << 20, SEED, BlockLog())
    running.load()
    refused = invoke("purge", folder)
    assert isinstance(refused.exception, CapacityError)
    assert str(folder / "0") in str(refused.exception)
    assert refused.output.startswith("deleted 1 blocks")
    assert [row["in_use"] for row in json.loads(invoke("stats", folder, "--json").output)] == [True, False]
    assert len(running.get([block(0).name])) == 1
    running.close()
    assert invoke("purge", folder).exit_code == 0


@pytest.mark.parametrize("command", ["stats", "ls", "verify", "purge"])
def test_a_folder_that_is_no_pool_is_refused(command, tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        refused = invoke(command, path)
        assert isinstance(refused.exception, ConfigError)
        assert "disk_pool_dir in [decode]" in str(refused.exception)


@pytest.fixture
def proxy() -> Iterator[str]:
    """Answers ``/nodes`` as a proxy with two workers does, of which one is down."""
    tier = TierStatus(
        name="disk",
        used_bytes=3 << 20,
        capacity_bytes=8 << 20,
        blocks=3,
        read_bytes_per_s=5e8,
        evictions=7,
        evicted={"probation": 7},
    )
    nodes = {"workers": {"a:1": {"status": {"tiers": [tier]}}, "b:2": {"status": None}}}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/nodes" else 404)
            self.end_headers()
            self.wfile.write(msgspec.json.encode(nodes))

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_stats_of_running_workers_come_from_the_proxy(proxy):
    (row,) = json.loads(invoke("stats", proxy, "--json").output)
    assert (row["worker"], row["name"], row["blocks"]) == ("a:1", "disk", 3)
    assert row["evicted"] == {"probation": 7}
    shown = " ".join(invoke("stats", proxy).output.split())
    assert "3.0 MiB" in shown
    assert "probation" in shown
    began = time.monotonic()
    assert isinstance(invoke("stats", "http://127.0.0.1:1").exception, LinkError)
    assert time.monotonic() - began < 10
