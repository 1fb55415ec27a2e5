"""Sums over all requests: those of a window, of a file that is opened again, and of one from before there were any."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import pytest

from proxy.ledger import Account, Entry, Ledger
from proxy.store import Store, Wanted
from proxy.totals import Totals, Way
from tests.dashboard.entries import varied

COUNT = 60


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@contextmanager
def opened(file: Path, max_rows: int = 1000) -> Iterator[Store]:
    with closing(Store(file, max_rows)) as store:
        yield store


def entries() -> list[Entry]:
    """Of all kinds: failed, gone on elsewhere, run again as a shadow, and without a route."""
    made = list(varied(Account("r", "m").close("ok"), COUNT))
    made[3] = msgspec.structs.replace(made[3], status="cancelled")
    made[4] = msgspec.structs.replace(made[4], failed_over="link_error")
    made[5] = msgspec.structs.replace(made[5], shadow_of="varied-1")
    made[6] = msgspec.structs.replace(made[6], route=None, codec=None, status="capacity_exceeded")
    return made


def counted(ways: list[Way]) -> dict[tuple[str, str], Way]:
    """Without the time, which a clock writes."""
    return {(way.route, way.codec): way._replace(since="") for way in ways}


def by_hand() -> dict[tuple[str, str], Way]:
    found: dict[tuple[str, str], Way] = {}
    for entry in entries():
        if entry.shadow_of is None:
            key = (entry.route or "", entry.codec or "")
            ours = [e for e in entries() if (e.route or "", e.codec or "") == key and e.shadow_of is None]
            gains = [e.specialization_gain_ns or 0 for e in ours]
            found[key] = Way(
                *key,
                since="",
                requests=len(ours),
                answered=sum(e.status == "ok" and e.failed_over is None for e in ours),
                gained_ns=sum(gain for gain in gains if gain > 0),
                lost_ns=sum(gain for gain in gains if gain < 0),
                kv_wire_bytes=sum(e.kv_wire_bytes for e in ours),
            )
    return found


def enter(ledger: Ledger) -> None:
    for entry in entries():
        ledger.add(entry)


def ways_of(totals: Totals) -> list[Way]:
    return [Way(**way) for way in totals.view()["ways"]]  # type: ignore[attr-defined]


def test_sums_outlive_the_window_of_entries() -> None:
    ledger = Ledger(5)
    enter(ledger)
    assert len(by_hand()) == 6
    assert counted(ways_of(ledger.totals)) == by_hand()
    assert ledger.totals.view()["seq"] == COUNT


def test_they_outlive_the_proxy_and_rows_that_are_forgotten(file: Path) -> None:
    with opened(file, max_rows=10) as store:
        assert store.totals == []
        ledger = Ledger(5, store)
        enter(ledger)
        assert store.flush(10)
        first = ledger.totals.view()
    with opened(file, max_rows=10) as store:
        assert sum(len(page) for page in store.pages(Wanted(), 1000)) == 10
        assert counted(store.totals) == by_hand()
        ledger = Ledger(5, store)
        assert ledger.totals.view() == first
        enter(ledger)
        twice = counted(ways_of(ledger.totals))
        assert all(twice[key].gained_ns == 2 * way.gained_ns for key, way in by_hand().items())
        assert all(twice[key].requests == 2 * way.requests for key, way in by_hand().items())


def test_a_file_from_before_is_summed_up_once(file: Path) -> None:
    with opened(file) as store:
        enter(Ledger(5, store))
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript("DROP TRIGGER entries_into_totals; DROP TABLE totals;")
    with opened(file) as store:
        assert counted(store.totals) == by_hand()
    with opened(file) as store:
        assert counted(store.totals) == by_hand()
