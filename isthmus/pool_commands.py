"""``isthmus pool``: what lies in a KV pool on disk, whether it is intact, and how to be rid of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from transfer.errors import CapacityError

folder_argument = click.argument("folder", type=click.Path(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def pool() -> None:
    """Look into KV pools: FOLDER is what `disk_pool_dir` in [decode] names.

    Exits 1 where blocks are found corrupt or a worker is in the way, 2 where FOLDER is no pool.
    """


@pool.command("stats")
@click.argument("where", metavar="FOLDER|URL")
@json_option
def pool_stats(where: str, as_json: bool) -> None:
    """Sum up the pool in FOLDER, or the tiers of every worker behind the proxy at URL."""
    from rich.console import Console

    from isthmus import pool

    rows = pool.tiers_of(where) if "://" in where else pool.parts_of(Path(where))
    if as_json:
        click.echo(json.dumps(rows))
    else:
        Console().print(pool.table(rows))


@pool.command("ls")
@folder_argument
@json_option
def pool_ls(folder: Path, as_json: bool) -> None:
    """List the blocks in FOLDER, the last used one first: key, model, tokens, bytes, seconds since its last use."""
    from isthmus import pool

    for block in pool.blocks_of(folder):
        click.echo(json.dumps(block) if as_json else pool.line(block))


@pool.command("verify")
@folder_argument
def pool_verify(folder: Path) -> None:
    """Read every block in FOLDER and compare its checksums; says which are corrupt, and exits 1 if any is.

    Nothing is changed: a worker drops corrupt blocks itself when it meets them.
    """
    from isthmus import pool

    intact, corrupt = pool.verify(folder)
    for path, reason in corrupt:
        click.echo(f"{path}: {reason}")
    click.echo(f"{intact} blocks are intact, {len(corrupt)} are not")
    sys.exit(1 if corrupt else 0)


@pool.command("purge")
@folder_argument
@click.option(
    "--older-than", type=click.FloatRange(0), default=0.0, metavar="HOURS", help="Only blocks not used since."
)
def pool_purge(folder: Path, older_than: float) -> None:
    """Delete the blocks in FOLDER. Parts that a running worker uses are left alone, and make it exit 1."""
    from isthmus import pool

    deleted, num_bytes, busy = pool.purge(folder, older_than * 3600)
    click.echo(f"deleted {deleted} blocks, {num_bytes / 2**20:,.1f} MiB")
    if busy:
        raise CapacityError(f"a running worker uses {', '.join(map(str, busy))}; stop it first")
