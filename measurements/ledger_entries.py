"""Entries of a proxy's ledger, read from its address or from a file, and checked before anything is counted."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import msgspec

from transfer.errors import ConfigError, LinkError

# As many as a proxy may keep.
_ALL = 1_000_000
_TIMEOUT_S = 10.0
# How every SQLite file begins (https://www.sqlite.org/fileformat.html).
_SQLITE = b"SQLite format 3\0"

Nanoseconds = Annotated[int, msgspec.Meta(ge=0)]
Amount = Annotated[int, msgspec.Meta(ge=0)]


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """What is counted of one closed request; names, units and meaning are those of ``proxy/ledger.py``.

    Fields that other versions have are ignored.
    """

    request_id: str
    status: str
    route: str | None
    codec: str | None
    prompt_tokens: Amount
    completion_tokens: Amount
    queue_ns: Nanoseconds
    tokenize_ns: Nanoseconds
    route_ns: Nanoseconds
    reserve_ns: Nanoseconds
    prefill_ns: Nanoseconds
    transfer_exposed_ns: Nanoseconds
    first_decode_ns: Nanoseconds
    decode_ns: Nanoseconds
    gather_ns: Nanoseconds
    encode_ns: Nanoseconds
    d2h_ns: Nanoseconds
    wire_ns: Nanoseconds
    decode_frame_ns: Nanoseconds
    inject_ns: Nanoseconds
    kv_raw_bytes: Amount
    kv_wire_bytes: Amount
    kv_reused_tokens: Amount = 0
    ttft_ns: Nanoseconds | None = None
    total_ns: Nanoseconds
    prefill_alternative_ns: Nanoseconds | None = None
    specialization_gain_ns: int | None = None
    failed_over: str | None = None
    ttft_error: float | None = None
    e2e_error: float | None = None
    regret_ns: Nanoseconds | None = None
    shadow_of: str | None = None

    @property
    def way(self) -> str:
        """How it was served: the route, with the codec where KV travelled."""
        return " ".join(part for part in (self.route or "no route", self.codec) if part)


def read(source: str) -> list[Spent]:
    """The entries of the proxy at the URL ``source``, or in the file of that name, newest last.

    A file is what the proxy keeps (``[proxy] ledger_file``, SQLite), or holds what ``GET /ledger`` answers, a list of
    entries, or one entry a line. Raises :class:`LinkError` if the proxy does not answer, :class:`ConfigError` naming
    the entry and the field that is wrong.
    """
    entries = _entries(source)
    found = []
    for number, entry in enumerate(entries, start=1):
        try:
            found.append(msgspec.convert(entry, Spent))
        except msgspec.ValidationError as error:
            raise ConfigError(f"{source}: entry {number} is none of the ledger's: {error}") from None
    if not found:
        raise ConfigError(f"{source} holds no entries; ask the proxy something first")
    return found


def _entries(source: str) -> Iterator[Any]:
    if source.startswith(("http://", "https://")):
        return _decode(_fetch(source), source)
    return _load(Path(source))


def choose(entries: Sequence[Spent], request_id: str | None) -> Spent:
    """The entry of that request; if None, the last one that was answered, after its KV had travelled if any did.

    Raises :class:`ConfigError` if there is none.
    """
    wanted = [entry for entry in entries if (entry.request_id == request_id if request_id else entry.status == "ok")]
    if not wanted:
        raise ConfigError(f"no entry of request {request_id!r}" if request_id else "no request was answered")
    travelled = [entry for entry in wanted if entry.codec]
    return (travelled or wanted)[-1]


def _fetch(url: str) -> bytes:
    import httpx

    address = url.rstrip("/").removesuffix("/ledger")
    try:
        answer = httpx.get(f"{address}/ledger", params={"last": _ALL}, timeout=_TIMEOUT_S, trust_env=False)
        answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise LinkError(f"{address} does not give its ledger: {error}") from None
    return answer.content


def _load(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            beginning = file.read(len(_SQLITE))
            return _rows(path) if beginning == _SQLITE else _decode(beginning + file.read(), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def _rows(path: Path) -> Iterator[Any]:
    """The entries of a proxy's own file; ``proxy/store.py`` says what is in it. The proxy may write meanwhile."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            for (entry,) in connection.execute("SELECT entry FROM entries ORDER BY seq"):
                yield msgspec.json.decode(entry)
    except (sqlite3.Error, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} is no ledger of a proxy's: {error}") from None


def _decode(raw: bytes, source: str) -> Iterator[Any]:
    try:
        whole = msgspec.json.decode(raw)
    except msgspec.DecodeError:
        yield from _lines(raw, source)
        return
    entries = whole.get("entries", [whole]) if isinstance(whole, dict) else whole
    if not isinstance(entries, list):
        raise ConfigError(f"{source}: `entries` is no list")
    yield from entries


def _lines(raw: bytes, source: str) -> Iterator[Any]:
    for number, line in enumerate(raw.splitlines(), start=1):
        if line.strip():
            try:
                yield msgspec.json.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ConfigError(f"{source}: line {number} is not JSON: {error}") from None
