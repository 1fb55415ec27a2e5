"""The pool that the cluster file asks for."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

import structlog

from cpu_decode.pool.below import LowerTiers, Tier
from cpu_decode.pool.block_log import BlockLog
from cpu_decode.pool.disk import DiskTier
from cpu_decode.pool.shared import SharedTier
from transfer.blocks import pool_seed
from transfer.config import Decode
from transfer.geometry import KVGeometry
from transfer.layout import RopeOrder

log = structlog.get_logger()

# What waits to be written stays in memory, at least so much and at most this share of what RAM may keep.
LEAST_BEHIND_BYTES, BEHIND_SHARE = 1 << 28, 0.5


def open_tiers(decode: Decode, seed: bytes, known: BlockLog) -> LowerTiers:
    """The tiers below RAM, for blocks named by ``seed``; ``known`` is told what they hold.

    Raises :class:`ConfigError` if the shared pool's URL is none or its client is missing.
    """
    asked = bool(decode.disk_pool_dir and decode.disk_pool_mib), bool(decode.shared_pool_url)
    if not any(asked):
        return LowerTiers()
    if not decode.pool_mib:
        log.warning("no KV is kept below RAM: [decode] pool_mib is 0, and what comes back from below goes through RAM")
        return LowerTiers()
    tiers: list[Tier] = []
    if asked[0]:
        tiers.append(DiskTier(Path(decode.disk_pool_dir), decode.disk_pool_mib << 20, seed, known))
    if asked[1]:
        tiers.append(SharedTier(decode.shared_pool_url, seed, known))
    return LowerTiers(tiers, max(LEAST_BEHIND_BYTES, int(BEHIND_SHARE * (decode.pool_mib << 20))))


def seed_of(decode: Decode, geometry: KVGeometry, rope_order: RopeOrder, gguf: Path) -> bytes:
    """The seed of block names. Where blocks outlive this process, all of the model file counts, else its geometry."""
    outlives = decode.disk_pool_dir or decode.shared_pool_url
    weights = _digest(gguf) if outlives else geometry.model_fingerprint
    return pool_seed(geometry, decode.cell_type, rope_order, weights, metadata.version("llama-cpp-python"))


def _digest(gguf: Path) -> str:
    with gguf.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
