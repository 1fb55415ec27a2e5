"""What all requests came to since the ledger began, by route and codec: the sums that no window of entries shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from proxy.ledger import Entry


class Way(NamedTuple):
    """Sums over the requests by one ``route`` and ``codec`` (empty: none), of which the first was closed at ``since``.

    ``answered`` were served by the node that they went to first. ``gained_ns`` and ``lost_ns`` (never above 0) are
    their specialization gains.
    """

    route: str
    codec: str
    since: str
    requests: int
    answered: int
    gained_ns: int
    lost_ns: int
    kv_wire_bytes: int


class Totals:
    """The sums of ``ways``, up to entry ``last_seq``, to which closed entries are added.

    Shadows are nobody's requests and do not count.
    """

    def __init__(self, ways: Iterable[Way] = (), last_seq: int = 0) -> None:
        self._ways = {(way.route, way.codec): way for way in ways}
        self.last_seq = last_seq

    def add(self, entry: Entry) -> None:
        """Take in a closed entry, in the order of ``seq``."""
        self.last_seq = entry.seq
        if entry.shadow_of:
            return
        key = (entry.route or "", entry.codec or "")
        way = self._ways.get(key) or Way(*key, entry.closed_at, 0, 0, 0, 0, 0)
        gain_ns = entry.specialization_gain_ns or 0
        self._ways[key] = way._replace(
            requests=way.requests + 1,
            answered=way.answered + (entry.status == "ok" and entry.failed_over is None),
            gained_ns=way.gained_ns + max(0, gain_ns),
            lost_ns=way.lost_ns + min(0, gain_ns),
            kv_wire_bytes=way.kv_wire_bytes + entry.kv_wire_bytes,
        )

    def view(self) -> dict[str, object]:
        """For JSON: the sums, and ``seq``, up to which entry they go."""
        ways = [way._asdict() for _, way in sorted(self._ways.items())]
        return {
            "seq": self.last_seq,
            "since": min((way.since for way in self._ways.values()), default=""),
            "ways": ways,
        }
