"""The shared tier: a server that speaks Redis's protocol, which several workers write to and read from."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import structlog

from cpu_decode.pool.block_log import BlockLog
from cpu_decode.pool.losses import Losses
from cpu_decode.pool.pause import Pause
from cpu_decode.pool.stored import HEADER_BYTES, CorruptBlockError, Payload, StoredBlock, check_payload, read_header
from transfer import blocks
from transfer.errors import ConfigError

log = structlog.get_logger()

PREFIX = b"isthmus:kv:"
# What nobody has written or read for a day may go; before that the server's own maxmemory and policy decide.
KEPT_S = 86_400
CONNECT_S, ANSWER_S = 0.5, 1.0
LEAST_PAUSE_S, MOST_PAUSE_S = 1.0, 60.0
BLOCKS_PER_READ = 8
# Blocks that this worker has seen there: they are not sent again, and the proxy is told of them.
MAX_KNOWN = 100_000


class SharedTier:
    """Blocks on the server at ``url``; only those of the pool ``seed`` ever match.

    A server that is away, slow or full costs at most ``ANSWER_S`` and is then left alone for a while. What it returns
    is checked. Raises :class:`ConfigError` if ``url`` is none or the client is not installed. Thread-safe.
    """

    name = "shared"

    def __init__(self, url: str, seed: bytes, known: BlockLog) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ModuleNotFoundError:
            raise ConfigError(
                "the client of the shared pool is not installed; install isthmus[decode], or leave [decode]"
                " shared_pool_url empty"
            ) from None
        try:
            self._client: Any = redis.Redis.from_url(
                url, socket_connect_timeout=CONNECT_S, socket_timeout=ANSWER_S, retry=Retry(NoBackoff(), 0)
            )
        except ValueError as error:
            raise ConfigError(f"{error} - at [decode] shared_pool_url") from None
        self._errors = (redis.RedisError, OSError)
        self._seed = seed
        self._known = known
        self._lock = threading.Lock()
        self._seen: OrderedDict[bytes, int] = OrderedDict()
        self._pause = Pause(LEAST_PAUSE_S, MOST_PAUSE_S)
        self.used_bytes = 0
        # The server bounds itself and says nothing about what it drops.
        self.capacity_bytes = 0
        self.losses = Losses()
        self.corrupt_blocks = 0

    def __len__(self) -> int:
        return len(self._seen)

    def load(self) -> None:
        """Nothing: what others have put there is found when it is asked for."""

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    def holds(self, name: bytes) -> bool:
        """Whether ``name`` has been seen there."""
        return name in self._seen

    def may_hold(self, name: bytes) -> bool:
        """Whether it is worth asking for ``name``."""
        return bool(name) and not self._pause.active

    def get(self, names: Sequence[bytes]) -> list[Payload]:
        """The first of ``names``, as far as they are all there and intact."""
        got: list[Payload] = []
        if self._pause.active:
            return got
        try:
            for start in range(0, len(names), BLOCKS_PER_READ):
                wanted = names[start : start + BLOCKS_PER_READ]
                found = cast("list[bytes | None]", self._client.mget([_key(name) for name in wanted]))
                for name, data in zip(wanted, found, strict=True):
                    payload = self._payload(name, data)
                    if payload is None:
                        return got
                    got.append(payload)
        except self._errors as error:
            self._failed(error)
        else:
            self._pause.succeeded()
        return got

    def put(self, block: StoredBlock) -> None:
        """Write ``block`` unless it is there."""
        if self.holds(block.name):
            return
        if self._pause.active:
            self.losses.refused["paused"] += 1
            return
        key = _key(block.name)
        try:
            # Whoever finds it there keeps it there.
            if not self._client.expire(key, KEPT_S):
                self._client.set(key, block.header() + block.payload.tobytes(), ex=KEPT_S, nx=True)
        except self._errors as error:
            self.losses.refused["failed"] += 1
            self._failed(error)
            return
        self._pause.succeeded()
        self._see(block.name, block.num_bytes)

    def _payload(self, name: bytes, data: bytes | None) -> Payload | None:
        if data is None:
            self._miss(name)
            return None
        try:
            header = read_header(data)
            if (header.name, header.seed) != (name, self._seed):
                raise CorruptBlockError("the server has another block under this name")
            payload = np.frombuffer(data, np.uint8, offset=HEADER_BYTES)
            check_payload(header, payload)
        except CorruptBlockError as error:
            self.corrupt_blocks += 1
            log.warning("a block of the shared pool is dropped", reason=str(error))
            self._miss(name, "corrupt")
            self._client.delete(_key(name))
            return None
        self._see(name, len(data))
        return payload

    def _see(self, name: bytes, num_bytes: int) -> None:
        gone = []
        with self._lock:
            new = name not in self._seen
            self._seen[name] = num_bytes
            self._seen.move_to_end(name)
            self.used_bytes += num_bytes if new else 0
            if len(self._seen) > MAX_KNOWN:
                oldest, oldest_bytes = self._seen.popitem(last=False)
                self.used_bytes -= oldest_bytes
                gone = [oldest]
                self.losses.evicted["forgotten"] += 1
        if new:
            self._known.add(self.name, [name])
        self._known.remove(self.name, gone)

    def _miss(self, name: bytes, reason: str = "gone") -> None:
        with self._lock:
            num_bytes = self._seen.pop(name, None)
            self.used_bytes -= num_bytes or 0
        if num_bytes is not None:
            self.losses.evicted[reason] += 1
            self._known.remove(self.name, [name])

    def _failed(self, error: Exception) -> None:
        seconds = self._pause.failed()
        log.warning("the shared pool is left alone for a while", seconds=seconds, reason=str(error))


def _key(name: bytes) -> bytes:
    return PREFIX + blocks.key(name).hex().encode()
