"""The decode engine's thread: it owns the llama.cpp context, takes what is asked of it between two steps, and steps."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import structlog

from cpu_decode.batching import Batching
from cpu_decode.events import Event
from cpu_decode.landing import LandingReport
from cpu_decode.llama import Context
from cpu_decode.prefix import Block
from cpu_decode.reuse import Plan
from cpu_decode.sequence import Sequence
from cpu_decode.speculate import Guessing
from cpu_decode.state import ChunkState
from cpu_decode.window_blocks import WindowBlocks
from transfer.errors import EngineError, IsthmusError
from transfer.messages import Failure, Tokens

log = structlog.get_logger()

IDLE_POLL_S = 0.25


class Engine:
    """Runs in its own thread; every public method is thread-safe and returns at once.

    ``emit``, ``wake`` and ``send`` are called on the engine's thread: the first for every event, the second when some
    are there to be looked at, the third with a client and what a step has brought for it; False: it cannot be reached.
    After :class:`Released` nothing more is emitted about a request.
    """

    def __init__(
        self,
        context: Context,
        *,
        batch_tokens: int,
        emit: Callable[[Event], None],
        wake: Callable[[], None],
        send: Callable[[bytes, list[Tokens | Failure]], bool],
        guessing: Guessing,
        windows: WindowBlocks | None = None,
    ) -> None:
        self.batching = Batching(
            context,
            batch_tokens=batch_tokens,
            emit=self._emit,
            answer=self._answer,
            guessing=guessing,
            windows=windows,
        )
        self._tell = emit
        self._wake = wake
        self._told = False
        self._send = send
        self._said: dict[bytes, list[Tokens | Failure]] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.failed: EngineError | None = None
        self._calibrated = threading.Event()
        self._thread = threading.Thread(target=self._run, name="isthmus-engine", daemon=True)

    def start(self) -> None:
        """Start the step loop; returns when the rates of prefill and injection are known, or ``failed`` is set."""
        self._thread.start()
        self._calibrated.wait()

    def admit(self, sequence: Sequence, plan: Plan) -> None:
        """Take a request whose cells are promised, with what it reuses; :class:`Restored` gives ``plan`` back."""
        self._inbox.put(lambda: self.batching.admit(sequence, plan))

    def land(self, request_id: str, chunk: ChunkState) -> None:
        """Inject ``chunk`` between two steps; :class:`Injected` gives the buffer back, whatever happens."""
        self._inbox.put(lambda: self.batching.land(request_id, chunk))

    def complete(self, request_id: str, report: LandingReport) -> None:
        """All chunks of a request have been handed over."""
        self._inbox.put(lambda: self.batching.complete(request_id, report))

    def begin(self, request_id: str, first_token: int | None, *, first_text_sent: bool, local: bool = False) -> None:
        """Start decoding when the KV is there; see :class:`~transfer.messages.Start`."""
        now = time.monotonic_ns()
        self._inbox.put(lambda: self.batching.begin(request_id, first_token, first_text_sent, now))
        if local:
            # Behind the chunks that were handed over before.
            self._inbox.put(lambda: self.batching.compute_the_rest(request_id))

    def leave(self, request_id: str, blocks: list[Block]) -> None:
        """Copy the KV of an :class:`Ended` request into those ``blocks`` that are not saved, then let go of it."""
        self._inbox.put(lambda: self.batching.leave(request_id, blocks))

    def copy(self, request_id: str, blocks: list[Block]) -> None:
        """Copy the KV of a prompted request into those ``blocks`` that are not saved; :class:`Copied` says when."""
        self._inbox.put(lambda: self.batching.copy(request_id, blocks))

    def fail(self, request_id: str, error: IsthmusError) -> None:
        """End a request with a Failure."""
        self._inbox.put(lambda: self.batching.fail(request_id, error))

    def abort(self, request_id: str) -> None:
        """End a request silently."""
        self._inbox.put(lambda: self.batching.abort(request_id))

    def stop(self) -> None:
        """Stop after the current step; requests still running get no word."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self.batching.calibrate()
            self._calibrated.set()
            while self._drain():
                self.batching.between_steps()
                self._flush()
                if self.batching.running_sequences:
                    self.batching.step()
                    self._flush()
                    self.batching.learn()
        except Exception as error:
            log.exception("engine stopped")
            self.failed = EngineError(f"decode engine stopped: {error}")
            self.batching.fail_all(self.failed)
            self._told = True
            self._flush()
            self._calibrated.set()

    def _emit(self, event: Event) -> None:
        self._tell(event)
        self._told = True

    def _answer(self, client: bytes, message: Tokens | Failure) -> None:
        self._said.setdefault(client, []).append(message)

    def _flush(self) -> None:
        """Send what was said and have what was emitted looked at: once a step, for either takes a core from computing.

        Whoever hears that a request has ended may ask for its cells: what was emitted of it is there to be looked at.
        """
        said, self._said = self._said, {}
        for client, messages in said.items():
            if not self._send(client, messages):
                # A stream with a hole would be a wrong answer.
                for message in messages:
                    self.batching.abort(message.request_id)
        if self._told:
            self._told = False
            self._wake()

    def _drain(self) -> bool:
        """Handle what waits in the inbox; sleep only when no sequence runs. False: stop."""
        try:
            action = self._inbox.get(block=not self.batching.busy, timeout=IDLE_POLL_S)
            while True:
                if action is None:
                    return False
                action()
                action = self._inbox.get_nowait()
        except queue.Empty:
            return True
