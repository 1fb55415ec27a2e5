"""Blocks to be stored, and a real server to store them on."""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cpu_decode.pool.stored import StoredBlock

SEED = b"s" * 16
OTHER_SEED = b"o" * 16


def block(number: int, num_bytes: int = 1000, seed: bytes = SEED) -> StoredBlock:
    """A block with contents of its own."""
    name = hashlib.blake2b(seed + number.to_bytes(8, "little"), digest_size=32).digest()
    return StoredBlock(name, seed, 64 * number, 64, payload(number, num_bytes))


def payload(number: int, num_bytes: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, num_bytes).astype(np.uint8)


@dataclass
class RedisServer:
    """A process and how to reach it."""

    url: str
    command: list[str]
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(self.url.removeprefix("unix://")) == 0:
                    return
            assert time.monotonic() < deadline and self.process.poll() is None, "redis-server does not start"
            time.sleep(0.01)


@contextmanager
def redis_server(folder: Path, *more: str) -> Iterator[RedisServer]:
    """Debian's redis-server on a socket in ``folder``; the test is skipped where it is not installed."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    pytest.importorskip("redis")
    path = folder / "redis.sock"
    command = [program, "--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no", *more]
    server = RedisServer(f"unix://{path}", [*command, "--dir", str(folder)], None)  # type: ignore[arg-type]
    server.start()
    try:
        yield server
    finally:
        server.kill()
