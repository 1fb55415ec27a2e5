"""The disk tier: files of one block each, bounded in bytes, there again after a restart."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import structlog

from cpu_decode.pool import block_files
from cpu_decode.pool.block_log import BlockLog
from cpu_decode.pool.losses import Losses
from cpu_decode.pool.pause import Pause
from cpu_decode.pool.stored import HEADER_BYTES, CorruptBlockError, Header, Payload, StoredBlock
from cpu_decode.segmented import SegmentedLru
from transfer import blocks

log = structlog.get_logger()

LEAST_PAUSE_S, MOST_PAUSE_S = 30.0, 3600.0


class DiskTier:
    """A part of the pool in ``folder``, of ``max_bytes`` at most; only blocks of the pool ``seed`` ever match.

    Eviction is that of RAM. What cannot be read back whole is forgotten and counted. A disk that cannot be written, or
    is full, is left alone for a while, which ``capacity_bytes`` 0 shows. Thread-safe.
    """

    name = "disk"

    def __init__(self, folder: Path, max_bytes: int, seed: bytes, known: BlockLog) -> None:
        self._seed = seed
        self._known = known
        self._lock = threading.Lock()
        self._keys: SegmentedLru[bytes] = SegmentedLru(max_bytes)
        # By key, all blocks of this pool's seed; other models' only take room until it is needed.
        self._names: dict[bytes, bytes] = {}
        self._pause = Pause(LEAST_PAUSE_S, MOST_PAUSE_S)
        self.losses = Losses()
        self.corrupt_blocks = 0
        self._part: Path | None = None
        self._descriptor: int | None = None
        try:
            self._part, self._descriptor = block_files.claim(folder)
        except OSError as error:
            log.error("KV is not kept on disk", folder=str(folder), reason=str(error))

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def used_bytes(self) -> int:
        """Size of all files."""
        return self._keys.used_bytes

    @property
    def capacity_bytes(self) -> int:
        """What may be used; 0 while nothing is written."""
        return self._keys.max_bytes if self._part is not None and not self._pause.active else 0

    def load(self) -> None:
        """Find out what is there, from headers alone; the last used blocks are the last to go."""
        if self._part is None:
            return
        began = time.monotonic()
        try:
            if torn := sum(1 for _ in (self._part / "tmp").glob(f"*{block_files.SUFFIX}")):
                self.losses.refused["torn"] += torn
            shutil.rmtree(self._part / "tmp", ignore_errors=True)
            (self._part / "tmp").mkdir(mode=0o700, exist_ok=True)
            found: list[tuple[float, Header]] = []
            for path in block_files.walk(self._part):
                try:
                    found.append((path.stat().st_mtime, block_files.read_header(path)))
                except FileNotFoundError:
                    continue
                except CorruptBlockError as error:
                    self._drop(path, error)
        except OSError as error:
            log.error("KV on disk cannot be found again", folder=str(self._part), reason=str(error))
            return
        for _, header in sorted(found, key=lambda pair: pair[0]):
            self._take_in(header)
        self._make_room(0)
        log.info(
            "KV found on disk",
            folder=str(self._part),
            blocks=len(self._keys),
            foreign_blocks=len(self._keys) - len(self._names),
            used_bytes=self.used_bytes,
            seconds=round(time.monotonic() - began, 3),
        )

    def close(self) -> None:
        """Let other workers have this part."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def holds(self, name: bytes) -> bool:
        """Whether ``name`` was there when it was last looked at."""
        return self._names.get(blocks.key(name)) == name

    def may_hold(self, name: bytes) -> bool:
        """The same."""
        return self.holds(name)

    def get(self, names: Iterable[bytes]) -> list[Payload]:
        """The first of ``names``, as far as they are all there and intact."""
        got: list[Payload] = []
        for name in names:
            payload = self._read(name)
            if payload is None:
                break
            got.append(payload)
        return got

    def put(self, block: StoredBlock) -> None:
        """Write ``block``, if there is room for it."""
        if self.holds(block.name):
            return
        if self._part is None or self._pause.active:
            self.losses.refused["paused"] += 1
            return
        if block.num_bytes > self._keys.max_bytes:
            self.losses.refused["too_large"] += 1
            return
        try:
            self._forget(blocks.key(block.name))
            self._make_room(block.num_bytes)
            block_files.write(self._part, block)
        except OSError as error:
            self.losses.refused["failed"] += 1
            seconds = self._pause.failed()
            log.error("KV is not written to disk for a while", seconds=seconds, reason=str(error))
            return
        self._pause.succeeded()
        self._take_in(Header(*block[:4], payload_bytes=block.payload.size, checksum=b""))

    def _read(self, name: bytes) -> Payload | None:
        if self._part is None or not self.holds(name):
            return None
        path = block_files.path_of(self._part, name)
        try:
            header, payload = block_files.read(path)
            if (header.name, header.seed) != (name, self._seed):
                raise CorruptBlockError("the file holds another block")
        except FileNotFoundError:
            self._forget(blocks.key(name))
            self.losses.evicted["gone"] += 1
            return None
        except (OSError, CorruptBlockError) as error:
            self._forget(blocks.key(name))
            self._drop(path, error)
            return None
        with self._lock:
            if blocks.key(name) in self._keys:
                self._keys.use([blocks.key(name)])
        # So that it is among the last to go after a restart, too.
        with suppress(OSError):
            os.utime(path)
        return payload

    def _take_in(self, header: Header) -> None:
        key = blocks.key(header.name)
        with self._lock:
            self._keys.add(key, HEADER_BYTES + header.payload_bytes)
            if header.seed == self._seed:
                self._names[key] = header.name
        if header.seed == self._seed:
            self._known.add(self.name, [header.name])

    def _make_room(self, num_bytes: int) -> None:
        """Delete what goes first until ``num_bytes`` more fit."""
        if self._part is None:
            return
        while self._keys.used_bytes + num_bytes > self._keys.max_bytes:
            with self._lock:
                victim = next(iter(self._keys))
                reason = "capacity" if self._keys.is_protected(victim) else "probation"
            self.losses.evicted[reason if victim in self._names else "foreign"] += 1
            self._forget(victim)
            block_files.path_of(self._part, victim).unlink(missing_ok=True)

    def _forget(self, key: bytes) -> None:
        with self._lock:
            self._keys.remove(key)
            name = self._names.pop(key, None)
        if name is not None:
            self._known.remove(self.name, [name])

    def _drop(self, path: Path, error: Exception) -> None:
        self.corrupt_blocks += 1
        self.losses.evicted["corrupt"] += 1
        log.warning("a block on disk is dropped", file=str(path), reason=str(error))
        with suppress(OSError):
            path.unlink(missing_ok=True)
