"""Codecs that the parity guard has switched off, and when each is to be tried again: state, and no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FIRST_PAUSE_S = 60.0
MAX_PAUSE_S = 3600.0
# So many good comparisons in a row bring a codec back.
GOOD_TO_RETURN = 4


@dataclass
class Probation:
    """Of one worker and the codec that was wrong; ``codecs`` are off with it. The next try is at ``next_ns``."""

    reason: str
    codecs: tuple[str, ...]
    next_ns: int
    pause_s: float
    tries: int = 0
    good: int = 0


class Probations:
    """All of them, by worker and codec. Times are of one monotonic clock, in ns."""

    def __init__(self) -> None:
        self._by_way: dict[tuple[str, str], Probation] = {}

    def begin(self, worker: str, codec: str, codecs: tuple[str, ...], reason: str, now_ns: int) -> None:
        """``codec`` was found wrong for ``worker``, and is switched off with ``codecs``."""
        self._by_way[worker, codec] = Probation(reason, codecs, now_ns + int(FIRST_PAUSE_S * 1e9), FIRST_PAUSE_S)

    def due(self, now_ns: int) -> tuple[str, str] | None:
        """Worker and codec that are to be tried now, the one that has waited longest."""
        ready = [(each.next_ns, way) for way, each in self._by_way.items() if each.next_ns <= now_ns]
        return min(ready)[1] if ready else None

    def passed(self, worker: str, codec: str) -> bool:
        """A try was good; whether the codec is on again, or another try follows at once."""
        probation = self._by_way[worker, codec]
        probation.tries += 1
        probation.good += 1
        if probation.good < GOOD_TO_RETURN:
            return False
        del self._by_way[worker, codec]
        return True

    def failed(self, worker: str, codec: str, now_ns: int) -> None:
        """A try was bad: the next one comes after twice the pause."""
        probation = self._by_way[worker, codec]
        probation.good = 0
        probation.pause_s = min(2 * probation.pause_s, MAX_PAUSE_S)
        self.postpone(worker, codec, now_ns)

    def postpone(self, worker: str, codec: str, now_ns: int) -> None:
        """A try has shown nothing; it is made again after the same pause."""
        probation = self._by_way[worker, codec]
        probation.tries += 1
        probation.next_ns = now_ns + int(probation.pause_s * 1e9)

    def forget(self, worker: str) -> None:
        """The worker is gone."""
        self._by_way = {way: each for way, each in self._by_way.items() if way[0] != worker}

    def distrusted(self, worker: str) -> dict[str, str]:
        """The codecs that are off for ``worker``, each with the reason."""
        own = [each for way, each in self._by_way.items() if way[0] == worker]
        return {codec: each.reason for each in reversed(own) for codec in each.codecs}

    def view(self, now_ns: int) -> list[dict[str, Any]]:
        """For people: what is off, when it is tried again at the earliest, and how far it has come."""
        return [
            {
                "worker": worker,
                "codec": codec,
                "next_try_s": max(0.0, round((each.next_ns - now_ns) / 1e9, 1)),
                "tries": each.tries,
                "good": each.good,
                "needed": GOOD_TO_RETURN,
            }
            for (worker, codec), each in self._by_way.items()
        ]
