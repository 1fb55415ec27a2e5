"""The ledger's file: what is in it after a crash, damage, a full disk, and what is found in it."""

from __future__ import annotations

import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import pytest

from proxy.ledger import Account, Entry, Ledger
from proxy.store import PAGE_ROWS, Row, Store, Wanted
from tests.proxy.conftest import wait_until
from transfer.errors import ConfigError

WRITER = """
import sys
from pathlib import Path
from proxy.store import Row, Store

store = Store(Path(sys.argv[1]), 1_000_000)
for seq in range(1, 1_000_000):
    entry = '{"seq": %d, "pad": "%s"}' % (seq, "x" * 1000)
    store.put(Row(seq, f"r{seq}", "2026-01-01T00:00:00", "split", "w", "q8", "ok", entry))
    if seq % 100 == 0:
        store.flush(10)
        print(seq, flush=True)
"""

ANY = Wanted()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@contextmanager
def opened(file: Path, max_rows: int = 1000) -> Iterator[Store]:
    with closing(Store(file, max_rows)) as store:
        yield store


def row(seq: int, **changes: str) -> Row:
    values = {"request_id": f"r{seq}", "route": "split", "worker": "w", "codec": "q8", "status": "ok"} | changes
    return Row(seq=seq, closed_at="2026-01-01T00:00:00", entry=f'{{"seq":{seq}}}', **values)


def seqs(store: Store, wanted: Wanted = ANY, last: int = 10_000, before: int | None = None) -> list[int]:
    return [msgspec.json.decode(entry)["seq"] for page in store.pages(wanted, last, before) for entry in page]


def fill(store: Store, count: int) -> None:
    for seq in range(1, count + 1):
        store.put(row(seq))
    assert store.flush(10)


def close(request_id: str, route: str | None = None) -> Entry:
    return msgspec.structs.replace(Account(request_id, "m").close("ok"), route=route)


def test_rows_are_there_when_it_is_opened_again(file):
    with opened(file) as store:
        fill(store, 3)
        assert store.last_seq == 0
    with opened(file) as store:
        assert store.last_seq == 3
        assert seqs(store) == [1, 2, 3]


def test_the_oldest_go(file):
    with opened(file, 10) as store:
        fill(store, 25)
        assert seqs(store) == list(range(16, 26))


def test_pages_are_the_newest_in_order_and_of_no_more_than_asked(file):
    count = 2 * PAGE_ROWS + 7
    with opened(file, 10_000) as store:
        fill(store, count)
        assert seqs(store) == list(range(1, count + 1))
        assert seqs(store, last=3) == [count - 2, count - 1, count]
        assert seqs(store, last=3, before=11) == [8, 9, 10]
        assert seqs(store, Wanted(since=count - 1)) == [count]
        assert seqs(store, Wanted(since=(1 << 63) - 1)) == []


def test_fields_choose(file):
    with opened(file) as store:
        changes = [{}, {"route": "gpu"}, {"status": "cancelled"}, {"worker": "v"}, {"codec": "raw"}]
        for seq, change in enumerate(changes, 1):
            store.put(row(seq, **change))
        store.flush(10)
        assert seqs(store, Wanted(route="gpu")) == [2]
        assert seqs(store, Wanted(status="cancelled")) == [3]
        assert seqs(store, Wanted(worker="v")) == [4]
        assert seqs(store, Wanted(codec="q8", status="ok")) == [1, 2, 4]
        assert seqs(store, Wanted(request_id="r5")) == [5]
        assert seqs(store, Wanted(request_id="' OR 1=1 --")) == []


def test_what_is_found_out_later_is_put_in(file):
    with opened(file) as store:
        store.put(row(1))
        store.amend(1, {"parity_kl": 0.25})
        store.flush(10)
        ((entry,),) = store.pages(ANY, 1)
    assert msgspec.json.decode(entry) == {"seq": 1, "parity_kl": 0.25}


def test_a_killed_writer_leaves_all_that_was_committed(file):
    command = [sys.executable, "-c", WRITER, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        said = [int(next(writer.stdout)) for _ in range(5)]
        writer.send_signal(signal.SIGKILL)
        said += [int(line) for line in writer.stdout]
    with opened(file, 1_000_000) as store:
        found = seqs(store, last=1_000_000)
        assert store.last_seq >= said[-1]
        assert found == list(range(1, store.last_seq + 1))
        store.put(row(store.last_seq + 1))
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_file_that_is_no_database_is_moved_aside(file):
    file.write_bytes(b"once upon a time" * 1000)
    with opened(file) as store:
        fill(store, 2)
        assert seqs(store) == [1, 2]
        assert store.unwritten == 0
    (aside,) = file.parent.glob("ledger.sqlite.broken-*")
    assert aside.read_bytes().startswith(b"once upon")


@pytest.mark.parametrize(("first", "last"), [(0.01, 1.0), (0.3, 0.5), (0.9, 1.0)])
def test_damage_behind_the_beginning_is_moved_aside_when_it_is_met(file, first, last):
    with opened(file, 100_000) as store:
        fill(store, 5000)
    size = file.stat().st_size
    with file.open("r+b") as damaged:
        damaged.seek(int(first * size))
        damaged.write(b"\xff" * int((last - first) * size))
    with opened(file, 10) as store:
        for seq in range(5001, 5100):
            store.put(row(seq))
        store.flush(10)
        assert store.unwritten == 0
        assert seqs(store)[-1] == 5099
    assert list(file.parent.glob("ledger.sqlite.broken-*"))


def test_a_full_disk_costs_rows_and_nothing_else(file):
    with opened(file, 100_000) as store:
        fill(store, 10)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # Python ignores SIGXFSZ, so that writing fails as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            for seq in range(11, 5000):
                store.put(row(seq))
            assert store.flush(20)
            assert store.unwritten > 1000
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        lost = store.unwritten
        store.put(row(5000))
        assert store.flush(10)
        assert store.unwritten == lost
        assert seqs(store)[-1] == 5000
        assert len(seqs(store)) == 5000 - lost


def test_a_queue_that_is_full_loses_rows_and_waits_for_nobody(file, monkeypatch):
    monkeypatch.setattr("proxy.store.QUEUED_ROWS", 5)
    with opened(file) as store:
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for seq in range(1, 21):
                store.put(row(seq))
            # One batch is on its way, five rows wait.
            wait_until(lambda: store.unwritten >= 10)
            other.execute("ROLLBACK")
        assert store.flush(10)
        assert len(seqs(store)) == 20 - store.unwritten


def test_two_proxies_do_not_share_a_file(file):
    with opened(file), pytest.raises(ConfigError, match="another proxy"):
        Store(file, 10)
    with opened(file):
        pass


def test_a_file_of_somebody_else_is_left_alone(file):
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE recipes (name)")
        connection.commit()
    with pytest.raises(ConfigError, match="no ledger"):
        Store(file, 10)
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT count(*) FROM recipes").fetchone() == (0,)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"ledger_file: cannot write beside .*no/where"):
        Store(tmp_path / "no" / "where", 10)


def test_a_ledger_reads_memory_first_and_the_rest_from_its_file(file):
    def found(ledger: Ledger, wanted: Wanted = ANY, last: int = 100) -> list[str]:
        pages = ledger.pages(wanted, last)
        return [msgspec.json.decode(entry, type=Entry).request_id for page in pages for entry in page]

    with opened(file) as store:
        ledger = Ledger(3, store)
        for number in range(8):
            ledger.add(close(f"r{number}", "gpu" if number % 2 else "cpu"))
        # What is in memory needs no file.
        assert found(ledger, last=2) == ["r6", "r7"]
        store.flush(10)
        assert found(ledger) == [f"r{number}" for number in range(8)]
        assert found(ledger, last=5) == ["r3", "r4", "r5", "r6", "r7"]
        assert found(ledger, Wanted(route="gpu"), last=3) == ["r3", "r5", "r7"]
        assert found(ledger, Wanted(since=7)) == ["r7"]
        ledger.amend(1, parity_kl=0.5)
        ledger.amend(8, parity_kl=0.25)
        store.flush(10)
    with opened(file) as store:
        ledger = Ledger(3, store)
        again = ledger.add(close("r8"))
        assert again.seq == 9
        assert again.closed_at.endswith("+00:00")
        assert found(ledger) == [f"r{number}" for number in range(9)]
        entries = [msgspec.json.decode(entry, type=Entry) for page in ledger.pages(ANY, 100) for entry in page]
        assert [entry.parity_kl for entry in entries] == [0.5, *[None] * 6, 0.25, None]
