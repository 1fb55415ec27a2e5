"""One transfer on the receiving side: where its frames go, and how far each of its senders is. No socket."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from transfer.errors import IsthmusError
from transfer.frames import Header
from transfer.shares import Share
from transfer.stages import SenderReport


class Sink(Protocol):
    """Where one ticket's frames go. ``data`` may raise :class:`IsthmusError`, which ends the transfer."""

    def data(self, header: Header, payload: memoryview, share: Share, received_ns: int) -> None:
        """Take one DATA frame, in sequence among those of its share, which came at ``received_ns`` (``monotonic_ns``).

        ``payload`` is only valid during the call.
        """

    def end(self, report: SenderReport) -> None:
        """All frames of all shares have come; raises :class:`ProtocolError` if they do not cover the prompt."""

    def fail(self, error: IsthmusError) -> None:
        """The transfer is over; nothing more will come."""


class Source:
    """One sender of a ticket, what it sends, and how far it is; ``report`` came with its END."""

    def __init__(self, sender: bytes, share: Share) -> None:
        self.sender = sender
        self.share = share
        self.sequence = 0
        self.asked_again = -1
        self.report: SenderReport | None = None


class Incoming:
    """One open ticket: its sink, and the senders that have used it; each has a share of its own."""

    def __init__(self, sink: Sink, chunks: int) -> None:
        self.sink = sink
        self.chunks = chunks
        self._sources: dict[bytes, Source] = {}

    @property
    def sources(self) -> Collection[Source]:
        """Those that have begun."""
        return self._sources.values()

    def source(self, sender: bytes, share: Share) -> Source | None:
        """``sender`` as a source; None if another sends some of that."""
        if sender not in self._sources:
            if any(share.overlaps(source.share) for source in self.sources):
                return None
            self._sources[sender] = Source(sender, share)
        return self._sources[sender]

    def reports(self, wanted: Share) -> list[SenderReport]:
        """Of all sources, once together they have sent all that is ``wanted``; until then none."""
        ended = [(source.share.size, source.report) for source in self.sources if source.report is not None]
        return [report for _, report in ended] if sum(size for size, _ in ended) == wanted.size else []
