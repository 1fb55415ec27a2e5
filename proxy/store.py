"""Closed ledger entries in a SQLite file, so that they outlive the proxy.

The file is plain SQLite (application id ``0x49535448``, user version 1), which other programs may read while the proxy
writes::

    CREATE TABLE entries (
        seq INTEGER PRIMARY KEY,     -- counts requests as they were closed
        request_id TEXT NOT NULL,
        closed_at TEXT NOT NULL,     -- ISO 8601, UTC, the proxy's wall clock
        route TEXT, worker TEXT, codec TEXT,
        status TEXT NOT NULL,
        entry TEXT NOT NULL          -- what ``GET /ledger`` says of it, as JSON
    )
    CREATE TABLE totals (...)        -- sums over all rows that ever were in it (``totals.py``), kept by a trigger

Rows are only added; the oldest go when there are too many, and what is found out later about a request is put into its
``entry``. Everything is written by one thread, in transactions of as many rows as wait, to a write-ahead log: a proxy
that is killed leaves what was committed, and a file that opens. Losing rows never stops the proxy: what cannot be
written, or waits when the queue is full, is counted, and a file that is no longer a database is moved aside.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import structlog

from proxy.totals import Way
from transfer.errors import ConfigError

QUEUED_ROWS = 10_000
BATCH_ROWS = 500
PAGE_ROWS = 500
CLOSE_S = 5.0
_APPLICATION_ID = 0x49535448  # ISTH
_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    seq INTEGER PRIMARY KEY,
    request_id TEXT NOT NULL,
    closed_at TEXT NOT NULL,
    route TEXT, worker TEXT, codec TEXT,
    status TEXT NOT NULL,
    entry TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS entries_by_request_id ON entries (request_id);
CREATE INDEX IF NOT EXISTS entries_by_status ON entries (status);
CREATE INDEX IF NOT EXISTS entries_by_route ON entries (route, codec);
"""
# A file of an older proxy lacks these. In a trigger the outer statement's OR REPLACE would rule the inner one.
_SUMS = """
CREATE TABLE totals (
    route TEXT NOT NULL, codec TEXT NOT NULL,
    since TEXT NOT NULL,
    requests INTEGER NOT NULL, answered INTEGER NOT NULL,
    gained_ns INTEGER NOT NULL, lost_ns INTEGER NOT NULL,
    kv_wire_bytes INTEGER NOT NULL,
    PRIMARY KEY (route, codec)
);
CREATE TRIGGER entries_into_totals AFTER INSERT ON entries
WHEN json_extract(new.entry, '$.shadow_of') IS NULL
BEGIN
    INSERT INTO totals SELECT coalesce(new.route, ''), coalesce(new.codec, ''), new.closed_at, 0, 0, 0, 0, 0
    WHERE NOT EXISTS (
        SELECT 1 FROM totals WHERE route = coalesce(new.route, '') AND codec = coalesce(new.codec, '')
    );
    UPDATE totals SET
        requests = requests + 1,
        answered = answered + (new.status = 'ok' AND json_extract(new.entry, '$.failed_over') IS NULL),
        gained_ns = gained_ns + max(0, coalesce(json_extract(new.entry, '$.specialization_gain_ns'), 0)),
        lost_ns = lost_ns + min(0, coalesce(json_extract(new.entry, '$.specialization_gain_ns'), 0)),
        kv_wire_bytes = kv_wire_bytes + coalesce(json_extract(new.entry, '$.kv_wire_bytes'), 0)
    WHERE route = coalesce(new.route, '') AND codec = coalesce(new.codec, '');
END;
INSERT INTO totals
SELECT
    coalesce(route, ''), coalesce(codec, ''), min(closed_at), count(*),
    sum(status = 'ok' AND json_extract(entry, '$.failed_over') IS NULL),
    sum(max(0, coalesce(json_extract(entry, '$.specialization_gain_ns'), 0))),
    sum(min(0, coalesce(json_extract(entry, '$.specialization_gain_ns'), 0))),
    sum(coalesce(json_extract(entry, '$.kv_wire_bytes'), 0))
FROM entries WHERE json_extract(entry, '$.shadow_of') IS NULL GROUP BY 1, 2;
"""
_INSERT = "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_AMEND = "UPDATE entries SET entry = json_patch(entry, ?) WHERE seq = ?"
_FORGET = "DELETE FROM entries WHERE seq <= (SELECT max(seq) FROM entries) - ?"
_BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}

log = structlog.get_logger()


class Row(NamedTuple):
    """A row of the table; ``entry`` is JSON."""

    seq: int
    request_id: str
    closed_at: str
    route: str | None
    worker: str | None
    codec: str | None
    status: str
    entry: str


class Wanted(NamedTuple):
    """Which entries are asked for: those after number ``since`` whose fields have the values that are not None."""

    since: int = 0
    request_id: str | None = None
    route: str | None = None
    worker: str | None = None
    codec: str | None = None
    status: str | None = None

    @property
    def values(self) -> dict[str, str]:
        """The fields that are asked for."""
        fields = self._asdict()
        del fields["since"]
        return {name: value for name, value in fields.items() if value is not None}

    def admits(self, entry: Any) -> bool:
        """Whether ``entry``, which has the fields as attributes, is asked for."""
        return entry.seq > self.since and all(getattr(entry, name) == value for name, value in self.values.items())


class Store:
    """The file at ``path``, which keeps the newest ``max_rows`` rows; made if it is not there.

    ``last_seq`` is the newest row's number and ``totals`` are the sums over all rows that ever were in it, when it was
    opened. Raises :class:`ConfigError` if the file cannot be opened, is somebody else's, or another proxy writes to it.
    """

    def __init__(self, path: Path, max_rows: int) -> None:
        self._path = path.absolute()
        self._max_rows = max_rows
        self.last_seq = 0
        self.totals: list[Way] = []
        self._overflown = self._refused = 0
        self._failing = False
        self._queue: queue.Queue[tuple[str, tuple[Any, ...]] | threading.Event | None] = queue.Queue(QUEUED_ROWS)
        self._lock = _lock(path)
        try:
            self._connection = self._open()
        except BaseException:
            os.close(self._lock)
            raise
        self._thread = threading.Thread(target=self._run, name="ledger store", daemon=True)
        self._thread.start()

    @property
    def unwritten(self) -> int:
        """How many rows and changes were lost."""
        return self._overflown + self._refused

    def put(self, row: Row) -> None:
        """Have ``row`` written soon; never waits."""
        self._soon(_INSERT, row)

    def amend(self, seq: int, changes: dict[str, Any]) -> None:
        """Have fields of the entry ``seq`` changed soon; never waits."""
        self._soon(_AMEND, (msgspec.json.encode(changes).decode(), seq))

    def pages(self, wanted: Wanted, last: int, before: int | None = None) -> Iterator[list[str]]:
        """The newest ``last`` entries that are ``wanted`` and older than number ``before``, as JSON, oldest first.

        They come a page at a time, each read on its own, so that a slow reader holds nothing up.
        """
        conditions = ["seq > ?", "seq < ?", *(f"{name} = ?" for name in wanted.values)]
        where = " AND ".join(conditions)
        values = [before or (1 << 63) - 1, *wanted.values.values()]
        newest = f"SELECT seq FROM entries WHERE {where} ORDER BY seq DESC LIMIT ?"  # noqa: S608 - names of ours
        rows = self._read(f"SELECT min(seq) FROM ({newest})", [wanted.since, *values, last])  # noqa: S608
        since = (rows[0][0] or 0) - 1 if rows else 0
        page = f"SELECT seq, entry FROM entries WHERE {where} ORDER BY seq LIMIT {PAGE_ROWS}"  # noqa: S608
        while since >= 0 and (rows := self._read(page, [since, *values])):
            since = rows[-1][0]
            yield [entry for _, entry in rows]

    def flush(self, timeout_s: float) -> bool:
        """Wait until what was put before is written, or was given up; False if that took too long."""
        done = threading.Event()
        with contextlib.suppress(queue.Full):
            self._queue.put(done, timeout=timeout_s)
        return done.wait(timeout_s)

    def close(self) -> None:
        """Write what waits, within ``CLOSE_S``, and let go of the file."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_S)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.error("the ledger's file does not take what waits", path=str(self._path), rows=self._queue.qsize())
            return
        self._connection.close()
        os.close(self._lock)

    def _soon(self, sql: str, values: tuple[Any, ...]) -> None:
        try:
            self._queue.put_nowait((sql, values))
        except queue.Full:
            self._overflown += 1

    def _run(self) -> None:
        running = True
        while running:
            items = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(items) < BATCH_ROWS:
                    items.append(self._queue.get_nowait())
            self._write([item for item in items if isinstance(item, tuple)])
            for item in items:
                if isinstance(item, threading.Event):
                    item.set()
            running = None not in items

    def _write(self, batch: list[tuple[str, tuple[Any, ...]]]) -> None:
        try:
            self._commit(batch)
        except sqlite3.Error as error:
            still = self._begin_anew(batch, error) if _is_broken(error) else error
            if still:
                self._refused += len(batch)
                if not self._failing:
                    log.error("the ledger's file cannot be written; goes on without", reason=str(still))
                self._failing = True
                return
        if self._failing:
            log.warning("the ledger's file can be written again", unwritten=self.unwritten)
        self._failing = False

    def _commit(self, batch: list[tuple[str, tuple[Any, ...]]]) -> None:
        if batch:
            with self._connection as transaction:
                for sql, values in batch:
                    transaction.execute(sql, values)
                transaction.execute(_FORGET, (self._max_rows,))

    def _begin_anew(self, batch: list[tuple[str, tuple[Any, ...]]], error: sqlite3.Error) -> Exception | None:
        """Put the broken file aside and write to a new one; returns what went wrong with that, None if nothing did."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()
        try:
            self._move_aside(error)
            self._connection = self._connect()
            self._commit(batch)
        except (sqlite3.Error, OSError) as still:
            return still
        return None

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.Error as error:
            if not _is_broken(error):
                raise ConfigError(f"[proxy] ledger_file: cannot open {self._path}: {error}") from None
            self._move_aside(error)
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, check_same_thread=False)
        try:
            (application_id,) = connection.execute("PRAGMA application_id").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            (num_tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if num_tables and (application_id, version) != (_APPLICATION_ID, _VERSION):
                raise ConfigError(
                    f"[proxy] ledger_file: {self._path} is a SQLite file, but no ledger of version {_VERSION};"
                    " name another file"
                )
            connection.execute("PRAGMA journal_mode = WAL")
            # A crash of the proxy loses nothing that was committed, a power cut perhaps the last transactions.
            connection.execute("PRAGMA synchronous = NORMAL")
            if not num_tables:
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {_VERSION}")
                connection.executescript(_SCHEMA)
            (has_totals,) = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'totals'").fetchone()
            if not has_totals:
                connection.executescript(f"BEGIN;{_SUMS}COMMIT;")
            self.totals = [Way(*row) for row in connection.execute("SELECT * FROM totals")]
            self.last_seq = connection.execute("SELECT max(seq) FROM entries").fetchone()[0] or 0
        except BaseException:
            connection.close()
            raise
        return connection

    def _move_aside(self, error: sqlite3.Error) -> None:
        aside = self._path.with_name(f"{self._path.name}.broken-{time.time_ns()}")
        log.error(
            "the ledger's file is broken: moved aside, begins a new one",
            path=str(self._path),
            aside=str(aside),
            reason=str(error),
        )
        self._path.rename(aside)
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

    def _read(self, sql: str, values: list[Any]) -> list[Any]:
        """Rows, on a connection of its own: readers and the writer do not wait for each other."""
        try:
            with contextlib.closing(sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True)) as connection:
                return connection.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            log.error("the ledger's file cannot be read", path=str(self._path), reason=str(error))
            return []


def _is_broken(error: sqlite3.Error) -> bool:
    # Extended codes keep the primary one in their lowest byte (https://www.sqlite.org/rescode.html).
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _BROKEN


def _lock(path: Path) -> int:
    """A file descriptor that holds the lock beside ``path``; the file's own locks are SQLite's business."""
    beside = path.with_name(f"{path.name}.lock")
    try:
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"[proxy] ledger_file: cannot write beside {path}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise ConfigError(f"[proxy] ledger_file: another proxy writes to {path}; each needs its own") from None
    return descriptor
