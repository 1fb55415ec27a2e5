"""KV into cells and out of them, between two steps, in the order of asking, a few milliseconds of it at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial

import structlog

from cpu_decode.gathering import Gathering
from cpu_decode.llama import Context, Saver
from cpu_decode.prefix import Block
from cpu_decode.sequence import Sequence
from cpu_decode.state import ChunkState, StateBlob
from cpu_decode.streams import StreamContext
from cpu_decode.window_blocks import WindowBlocks
from transfer.errors import EngineError

log = structlog.get_logger()

# Between two steps, KV is copied for about as long as this: other sequences wait for it.
COPY_NS = 2_500_000


class Copies:
    """Copies of KV, and the words that they are complete, in the order in which they came. Engine thread only."""

    def __init__(self, context: Context, windows: WindowBlocks | None) -> None:
        self._context = context
        self._windows = windows
        # Streams of cells take a sequence's KV whole.
        self._gathering = Gathering(context) if isinstance(context, StreamContext) else None
        self._waiting: deque[Callable[[], None]] = deque()

    def __bool__(self) -> bool:
        """Whether something is to be copied, or to be said behind what was."""
        return bool(self._waiting)

    def then(self, action: Callable[[], None]) -> None:
        """Do ``action``, one copy or a word that some are complete, behind everything that was asked for before."""
        self._waiting.append(action)

    def run(self) -> None:
        """Copy what is due, at least one piece, and stop before a piece as long as the last would make it too long."""
        began = piece_began = time.monotonic_ns()
        while self._waiting:
            self._waiting.popleft()()
            now = time.monotonic_ns()
            if 2 * now - piece_began - began > COPY_NS:
                return
            piece_began = now

    @property
    def gathered_bytes(self) -> int:
        """Memory of KV that is to be in streams of cells, and is not yet."""
        return self._gathering.num_bytes if self._gathering else 0

    def inject(self, sequence: Sequence, chunk: ChunkState | StateBlob) -> None:
        """Append ``chunk`` to the KV of ``sequence``, in its cells or on the way there; raises :class:`EngineError`."""
        began = time.monotonic_ns()
        if self._gathering:
            self._gathering.add(sequence, chunk)
        else:
            self._context.inject(chunk, sequence.seq_id)
        sequence.inject_ns += time.monotonic_ns() - began
        sequence.num_cached += chunk.num_tokens
        self.follow(sequence, chunk)

    def settle(self, sequence: Sequence) -> bool:
        """Put what has gathered for ``sequence`` into its stream; False if nothing has. Raises :class:`EngineError`."""
        began = time.monotonic_ns()
        settled = self._gathering is not None and self._gathering.settle(sequence)
        if settled:
            sequence.inject_ns += time.monotonic_ns() - began
        return settled

    def forget(self, sequence: Sequence) -> None:
        """The request has ended: what has gathered for it goes nowhere."""
        if self._gathering:
            self._gathering.drop(sequence)

    def follow(self, sequence: Sequence, injected: ChunkState | StateBlob | None = None) -> None:
        """After ``sequence`` has got KV, perhaps ``injected``: copy what a window may leave to others."""
        if self._windows is not None:
            self._windows.follow(sequence, injected)

    def keep(self, sequence: Sequence, blocks: list[Block]) -> None:
        """Copy in their turn what ``blocks`` are to keep out of the cells of ``sequence``.

        Those stay unsaved that cannot be copied.
        """
        save = self._context.saver(sequence.seq_id)
        for block in blocks:
            self.then(partial(self._save, sequence, block, save))

    def _save(self, sequence: Sequence, block: Block, save: Saver) -> None:
        if block.saved:
            return
        if self._windows is not None and (copied := self._windows.copied(sequence, block)) is not None:
            block.buffer, block.saved = copied, True
            return
        try:
            save(range(block.start_token, block.end_token), block.buffer)
            block.saved = True
        except EngineError as error:
            log.info("KV is not kept", request_id=sequence.request_id, reason=str(error))
