"""What disturbs sequences that decode: gaps between tokens while a handoff lands or a local prompt prefills."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from measurements.decode_ways import Setting
from measurements.decode_worker import LiveWorker, Stream

Sample = dict[str, Any]

SHORT_STEPS = 16


class Load(NamedTuple):
    """What decodes, and what disturbs it.

    ``sequences`` decode; ``handoffs`` times ``handoff_tokens`` tokens land, each after ``quiet_steps`` steps without;
    then as many tokens prefill, after as many steps as those together: a prefill takes longer, and a host that now and
    then holds a step up does so in both. The time to logits is that of ``short_tokens``, so many times.
    """

    sequences: int = 8
    handoff_tokens: int = 4096
    handoffs: int = 5
    quiet_steps: int = 40
    short_tokens: int = 1000
    short_handoffs: int = 15

    @property
    def decoding_tokens(self) -> int:
        """What each of the decoding sequences may need meanwhile."""
        return 3 * self.handoffs * self.quiet_steps

    def cells(self, context_tokens: int) -> int:
        """Cells for all of it."""
        return self.sequences * (context_tokens + self.decoding_tokens) + self.handoff_tokens + 1


class Window(NamedTuple):
    """A stretch of time on this process's monotonic clock."""

    began_ns: int
    ended_ns: int


def handoffs(worker: LiveWorker, setting: Setting, load: Load) -> Iterator[Sample]:
    """Gaps of decoding sequences, quiet and while the KV of one more prompt lands, in turns."""
    streams = _decoding(worker, setting, load)
    for turn in range(load.handoffs):
        quiet = _quiet(worker, streams, load.quiet_steps)
        landing = worker.reserve(load.handoff_tokens, 1, "kv")
        worker.start(landing)
        began = time.monotonic_ns()
        worker.land(landing)
        worker.take_until([landing])
        yield from _samples("handoff", turn, streams, quiet, Window(began, landing.times_ns[-1]))
    _end(worker, streams)


def local_prefill(worker: LiveWorker, setting: Setting, load: Load) -> Iterator[Sample]:
    """The same while one more prompt prefills here, as far as it comes before the other sequences end."""
    streams = _decoding(worker, setting, load)
    quiet = _quiet(worker, streams, load.handoffs * load.quiet_steps)
    prompt = worker.reserve(load.handoff_tokens, 1, "local")
    began = time.monotonic_ns()
    worker.start(prompt)
    while prompt.last is None and all(stream.last is None for stream in streams):
        worker.take_for(0.1)
    ended = min([s.times_ns[-1] for s in [*streams, prompt] if s.last], default=time.monotonic_ns())
    yield from _samples("prefill", 0, streams, quiet, Window(began, ended))
    _end(worker, [*streams, prompt])


def to_logits(worker: LiveWorker, load: Load) -> Iterator[Sample]:
    """From a short handoff's last frame to its first token, beyond a step of that sequence.

    By the worker's clock, from its taking up the frame to the token's logits; and by ours, from sending the one to
    hearing the other.
    """
    # The first finds its way and its code; it does not count.
    for turn in range(load.short_handoffs + 1):
        stream = worker.reserve(load.short_tokens, SHORT_STEPS, "kv")
        worker.start(stream)
        worker.land(stream, hold_back=True)
        # Everything but that frame is injected by then.
        worker.take_for(0.5)
        began = time.monotonic_ns()
        worker.land_rest(stream)
        worker.take_until([stream])
        step_ns = statistics.median(gaps_ns(stream))
        worker.idle()
        report = stream.last.report if stream.last else None
        if turn and report:
            yield {
                "what": "handoff_to_logits",
                "repeat": turn,
                "ms": (report.landing_tail_ns + report.first_decode_ns - step_ns) / 1e6,
                "sent_to_heard_ms": (stream.times_ns[0] - began - step_ns) / 1e6,
                "step_ms": step_ns / 1e6,
            }


def gaps_ns(stream: Stream, window: Window | None = None) -> list[float]:
    """Time between arrivals, over the tokens of the later one, within ``window``."""
    pairs = zip(stream.times_ns, stream.times_ns[1:], stream.counts[1:], strict=False)
    return [
        (later - earlier) / count
        for earlier, later, count in pairs
        if window is None or (window.began_ns <= later and earlier <= window.ended_ns)
    ]


def _decoding(worker: LiveWorker, setting: Setting, load: Load) -> list[Stream]:
    streams = [worker.reserve(setting.context_tokens, load.decoding_tokens, "kv") for _ in range(load.sequences)]
    for stream in streams:
        worker.land(stream)
        worker.start(stream)
    worker.take_until(streams, 2)
    return streams


def _quiet(worker: LiveWorker, streams: Sequence[Stream], steps: int) -> Window:
    began = time.monotonic_ns()
    worker.take_until(streams, sum(streams[0].counts) + steps)
    return Window(began, time.monotonic_ns())


def _samples(
    what: Literal["handoff", "prefill"], turn: int, streams: Sequence[Stream], quiet: Window, disturbed: Window
) -> Iterator[Sample]:
    for name, window in (("quiet", quiet), ("disturbed", disturbed)):
        gaps = [gap / 1e6 for stream in streams for gap in gaps_ns(stream, window)]
        yield {"what": f"itl_{what}", "repeat": turn, "during": name, "gaps_ms": [round(gap, 3) for gap in gaps]}


def _end(worker: LiveWorker, streams: Sequence[Stream]) -> None:
    for stream in streams:
        if stream.last is None:
            worker.abort(stream)
    worker.idle()
