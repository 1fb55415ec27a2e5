"""What ``isthmus pool`` does, over block files alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.table import Table

from cpu_decode.pool import block_files
from cpu_decode.pool.stored import HEADER_BYTES, CorruptBlockError
from transfer import blocks
from transfer.errors import ConfigError, LinkError

ANSWER_S = 5.0
API_KEY = "ISTHMUS_API_KEY"


def parts_of(folder: Path) -> list[dict[str, Any]]:
    """Each part of the pool in ``folder``: its blocks by model, bytes, and whether a worker runs on it.

    Raises :class:`ConfigError` if that is no pool.
    """
    rows = []
    for part in _parts(folder):
        seeds: dict[str, int] = {}
        num_blocks = used_bytes = corrupt = 0
        for path in block_files.walk(part):
            try:
                header = block_files.read_header(path)
            except FileNotFoundError:
                continue
            except CorruptBlockError:
                corrupt += 1
                continue
            num_blocks += 1
            used_bytes += HEADER_BYTES + header.payload_bytes
            seeds[header.seed.hex()] = seeds.get(header.seed.hex(), 0) + 1
        rows.append(
            {
                "part": str(part),
                "in_use": block_files.in_use(part),
                "blocks": num_blocks,
                "used_bytes": used_bytes,
                "corrupt_headers": corrupt,
                "models": seeds,
            }
        )
    return rows


def tiers_of(url: str) -> list[dict[str, Any]]:
    """The tiers of every worker that the proxy at ``url`` knows; raises :class:`LinkError` if it does not answer."""
    import httpx

    key = os.environ.get(API_KEY)
    try:
        answer = httpx.get(
            f"{url.rstrip('/')}/nodes",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=ANSWER_S,
            trust_env=False,
        )
        answer.raise_for_status()
        workers = answer.json()["workers"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise LinkError(f"no proxy answers at {url}: {error}") from None
    return [
        {"worker": name} | tier for name, view in workers.items() for tier in (view["status"] or {}).get("tiers", [])
    ]


def table(rows: list[dict[str, Any]]) -> Table:
    """``rows`` of :func:`parts_of` or of :func:`tiers_of` for people."""
    shown = [_tier(row) if "worker" in row else row for row in rows]
    made = Table()
    for key in shown[0] if shown else ():
        made.add_column(key.replace("_", " "), justify="left" if isinstance(shown[0][key], str) else "right")
    for row in shown:
        made.add_row(*(_cell(key, value) for key, value in row.items()))
    return made


def _tier(row: dict[str, Any]) -> dict[str, Any]:
    """What of a tier fits beside each other."""
    used, capacity = (_cell("_bytes", row[key]) for key in ("used_bytes", "capacity_bytes"))
    return {
        "worker": row["worker"],
        "tier": row["name"],
        "blocks": row["blocks"],
        "used": f"{used} of {capacity}" if row["capacity_bytes"] else used,
        "hits": row["hits"],
        "hit_tokens": row["hit_tokens"],
        "read": _cell("bytes_per_s", row["read_bytes_per_s"]) if row["read_bytes_per_s"] else "",
        "evicted": row["evicted"],
        "refused": row["refused"],
    }


def blocks_of(folder: Path) -> Iterator[dict[str, Any]]:
    """The blocks in ``folder`` whose headers are intact, the last used one first."""
    found: list[tuple[float, Path]] = []
    for part in _parts(folder):
        for path in block_files.walk(part):
            with suppress(FileNotFoundError):
                found.append((path.stat().st_mtime, path))
    for used_s, path in sorted(found, reverse=True):
        with suppress(FileNotFoundError, CorruptBlockError):
            header = block_files.read_header(path)
            yield {
                "part": path.parent.parent.name,
                "key": blocks.key(header.name).hex(),
                "model": header.seed.hex(),
                "start_token": header.start_token,
                "num_tokens": header.num_tokens,
                "num_bytes": HEADER_BYTES + header.payload_bytes,
                "unused_s": round(max(0.0, time.time() - used_s), 1),
            }


def line(block: dict[str, Any]) -> str:
    """One of :func:`blocks_of` for people."""
    end = block["start_token"] + block["num_tokens"]
    return (
        f"{block['part']}/{block['key']}  model {block['model'][:8]}  tokens {block['start_token']}-{end}"
        f"  {block['num_bytes']} bytes  unused for {block['unused_s']:g} s"
    )


def verify(folder: Path) -> tuple[int, list[tuple[Path, str]]]:
    """How many blocks in ``folder`` are intact, and which are not and why."""
    intact, corrupt = 0, []
    for part in _parts(folder):
        for path in block_files.walk(part):
            try:
                block_files.read(path)
                intact += 1
            except FileNotFoundError:
                continue
            except (CorruptBlockError, OSError) as error:
                corrupt.append((path, str(error)))
    return intact, corrupt


def purge(folder: Path, older_than_s: float) -> tuple[int, int, list[Path]]:
    """Delete what was not used for ``older_than_s``: blocks, bytes, and the parts left alone because workers run."""
    deleted = num_bytes = 0
    busy = []
    oldest_s = time.time() - older_than_s
    for part in _parts(folder):
        if block_files.in_use(part):
            busy.append(part)
            continue
        for path in list(block_files.walk(part)):
            about = path.stat()
            if not older_than_s or about.st_mtime < oldest_s:
                path.unlink()
                deleted += 1
                num_bytes += about.st_size
    return deleted, num_bytes, busy


def _parts(folder: Path) -> list[Path]:
    parts = block_files.parts(folder) if folder.is_dir() else []
    if not parts:
        raise ConfigError(f"{folder} is no KV pool; give the folder that disk_pool_dir in [decode] names")
    return parts


def _cell(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if key.endswith("bytes_per_s"):
        return f"{value / 2**20:,.0f} MiB/s"
    if isinstance(value, dict):
        return ", ".join(f"{what[:10]}: {count}" for what, count in value.items())
    return str(value)
