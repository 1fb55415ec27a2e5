"""Token pieces become text: whole UTF-8 characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs


class TextStream:
    """Feeds on pieces (bytes), gives text as soon as it can no longer change."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, piece: bytes, *, may_stop: bool = True) -> str:
        """Text that ``piece`` completes. Sets ``stopped`` when a stop string has appeared; it is not given out.

        Where it may not stop yet, a stop string is text like any other.
        """
        if not self._stop:
            # Nothing is ever held, at every token of nearly every request.
            return self._decoder.decode(piece)
        return self._give(self._decoder.decode(piece), final=False, may_stop=may_stop)

    def flush(self) -> str:
        """What is still held at the end; bytes that complete no character become U+FFFD."""
        return self._give(self._decoder.decode(b"", final=True), final=True, may_stop=True)

    def _give(self, new: str, *, final: bool, may_stop: bool) -> str:
        before = len(self._held)
        self._held += new
        # One that ended earlier came when it could not stop: it is held as the beginning of a longer one.
        starts = [self._held.find(stop, max(0, before + 1 - len(stop))) for stop in self._stop if may_stop]
        if found := [at for at in starts if at >= 0]:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = 0 if final else self._undecided()
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _undecided(self) -> int:
        """Length of the longest tail that could still grow into a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
