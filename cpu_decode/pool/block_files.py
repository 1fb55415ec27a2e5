"""Blocks as files: where they lie in a pool's folder, and how they are written and read so that a crash does no harm.

``DIR/0/`` is the first worker's part of the pool, ``DIR/1/`` that of another one on the same host, as many as run at a
time; ``DIR/0.lock`` is locked while a worker uses it. In it ``ab/abcdef....kv`` is a block by the hex of its key, and
``tmp/`` has what is being written.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cpu_decode.pool.stored import HEADER_BYTES, CorruptBlockError, Header, Payload, StoredBlock, check_payload
from cpu_decode.pool.stored import read_header as parse_header
from transfer import blocks

SUFFIX = ".kv"
MAX_PARTS = 256


def claim(folder: Path) -> tuple[Path, int]:
    """The first part of the pool in ``folder`` that no worker uses, and the descriptor that keeps it locked.

    Raises :class:`OSError` if there is none or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(MAX_PARTS):
        descriptor = os.open(folder / f"{number}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        part = folder / str(number)
        for name in (part, part / "tmp"):
            name.mkdir(mode=0o700, exist_ok=True)
        return part, descriptor
    raise BlockingIOError(f"{MAX_PARTS} workers use {folder}")


def parts(folder: Path) -> list[Path]:
    """The parts of the pool in ``folder``, by number."""
    found = (path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())
    return sorted(found, key=lambda path: int(path.name))


def in_use(part: Path) -> bool:
    """Whether a running worker has ``part``."""
    try:
        descriptor = os.open(part.with_suffix(".lock"), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def path_of(part: Path, name: bytes) -> Path:
    """Where the block ``name`` lies."""
    key = blocks.key(name).hex()
    return part / key[:2] / f"{key}{SUFFIX}"


def walk(part: Path) -> Iterator[Path]:
    """All block files, in no order."""
    for folder in part.iterdir():
        if len(folder.name) == 2 and folder.is_dir():
            yield from (path for path in folder.iterdir() if path.suffix == SUFFIX)


def write(part: Path, block: StoredBlock) -> None:
    """Write ``block`` so that its file is there whole or not at all; raises :class:`OSError`.

    Its pages are given back to the system: RAM has the block already.
    """
    path = path_of(part, block.name)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    unfinished = part / "tmp" / path.name
    try:
        with unfinished.open("wb", buffering=0) as file:
            for data in (memoryview(block.header()), block.payload.data):
                done = 0
                while done < len(data):
                    done += file.write(data[done:])
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        unfinished.rename(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def read_header(path: Path) -> Header:
    """What the file at ``path`` says of itself, its payload unread.

    Raises :class:`CorruptBlockError` if that is nothing sensible or the file is not as long as it says, and
    :class:`OSError`.
    """
    with path.open("rb", buffering=0) as file:
        header = parse_header(file.read(HEADER_BYTES))
        num_bytes = os.fstat(file.fileno()).st_size
    if num_bytes != HEADER_BYTES + header.payload_bytes:
        raise CorruptBlockError(f"the file has {num_bytes} bytes, its header says {header.payload_bytes} of payload")
    if path.name != f"{blocks.key(header.name).hex()}{SUFFIX}":
        raise CorruptBlockError(f"the file holds block {blocks.key(header.name).hex()}")
    return header


def read(path: Path) -> tuple[Header, Payload]:
    """The block at ``path``, checked; raises what :func:`read_header` raises."""
    header = read_header(path)
    payload = np.empty(header.payload_bytes, np.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(HEADER_BYTES)
        done = 0
        while done < payload.size:
            count = file.readinto(payload.data[done:])
            if not count:
                raise CorruptBlockError("the file has become shorter")
            done += count
    check_payload(header, payload)
    return header, payload
