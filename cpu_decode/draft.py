"""A second, smaller model that guesses: the same vocabulary, a context of its own, and only the last tokens in it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from cpu_decode.llama import Batch, Context, Model
from cpu_decode.sequence import Sequence as Decoding
from cpu_decode.threadpool import PinnedThreads
from transfer.errors import ConfigError

# A guess needs no more than the last tokens; when this many have gathered, all but the latest are forgotten.
WINDOW_TOKENS, KEPT_TOKENS = 512, 192
# What a model has not seen yet it computes in pieces, for the other sequences wait for it.
CATCH_UP_TOKENS = 64


class _Seen:
    """What the draft model has in its cells of one sequence: the tokens from position ``start`` on."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.tokens: list[int] = []


class DraftModel:
    """Guesses greedily for several sequences at once. Engine thread only; :meth:`close` frees it.

    Raises :class:`ConfigError` if llama.cpp cannot load the file, or if its vocabulary is not that of ``target``.
    """

    def __init__(self, gguf: Path, target: Model, *, max_sequences: int, threads: int, batch_threads: int = 0) -> None:
        self._model = Model(gguf)
        try:
            require_same_vocabulary(target, self._model, gguf)
            self._batch = Batch(max(CATCH_UP_TOKENS, max_sequences))
            self._context = Context(
                self._model,
                num_cells=WINDOW_TOKENS * max_sequences,
                max_sequences=max_sequences,
                batch_tokens=self._batch.capacity,
                threads=threads,
                cell_type="f16",
                batch_threads=batch_threads,
            )
        except ConfigError:
            self._model.close()
            raise
        self._pinned: PinnedThreads | None = None
        self._seen: dict[int, _Seen] = {}
        # Of one token for every sequence.
        self.step_ns = 0.0

    def pin(self, cpus: Sequence[int], batch_cpus: Sequence[int]) -> None:
        """Compute on ``cpus``, one thread each, and batches of more than one token on ``batch_cpus``."""
        self._pinned = PinnedThreads(self._context, cpus, batch_cpus)

    def calibrate(self) -> None:
        """Time a step; on the thread that guesses."""
        for _ in range(3):
            began = time.monotonic_ns()
            self._compute([(0, 0, [self._model.end_tokens[0]])])
            self.step_ns = float(time.monotonic_ns() - began)
            self._context.trim(0, 0)

    def guess(self, decoding: Sequence[Decoding], counts: Sequence[int]) -> list[list[int]]:
        """The likeliest ``counts`` tokens behind each sequence; none where it has to catch up first."""
        room = CATCH_UP_TOKENS
        guesses: list[list[int]] = [[] for _ in decoding]
        ready = []
        for at, (sequence, count) in enumerate(zip(decoding, counts, strict=True)):
            if count and (missing := self._missing(sequence)):
                piece = missing[: min(len(missing) - 1, room)]
                room -= len(piece)
                self._append(sequence.seq_id, piece)
                if len(piece) == len(missing) - 1:
                    ready.append((at, sequence.seq_id, missing[-1]))
        began, steps = time.monotonic_ns(), 0
        while ready:
            rows = self._compute([(seq_id, self._note(seq_id, token), [token]) for _, seq_id, token in ready])
            for (at, _, _), row in zip(ready, rows, strict=True):
                guesses[at].append(int(self._context.live_logits(row).argmax()))
            ready = [(at, seq_id, guesses[at][-1]) for at, seq_id, _ in ready if len(guesses[at]) < counts[at]]
            steps += 1
        if steps:
            self.step_ns += 0.2 * ((time.monotonic_ns() - began) / steps - self.step_ns)
        return guesses

    def forget(self, seq_id: int) -> None:
        """The sequence has ended."""
        if self._seen.pop(seq_id, None):
            self._context.trim(seq_id, 0)

    def close(self) -> None:
        """Free the context and the weights."""
        self._context.close()
        if self._pinned:
            self._pinned.close()
        self._model.close()

    def _missing(self, sequence: Decoding) -> list[int]:
        """The tokens that the cells lack, at least the last one; what was guessed wrong is dropped from them."""
        seq_id, tokens = sequence.seq_id, sequence.tokens
        seen = self._seen.get(seq_id)
        if seen is None or len(tokens) - seen.start > WINDOW_TOKENS - CATCH_UP_TOKENS:
            self.forget(seq_id)
            seen = self._seen[seq_id] = _Seen(max(0, len(tokens) - KEPT_TOKENS))
        wanted = tokens[seen.start : len(tokens) - 1]
        same = next((at for at, pair in enumerate(zip(seen.tokens, wanted, strict=False)) if pair[0] != pair[1]), None)
        keep = min(len(seen.tokens), len(wanted)) if same is None else same
        if keep < len(seen.tokens):
            del seen.tokens[keep:]
            self._context.trim(seq_id, keep)
        return tokens[seen.start + keep :]

    def _append(self, seq_id: int, piece: list[int]) -> None:
        if piece:
            seen = self._seen[seq_id]
            self._compute([(seq_id, len(seen.tokens), piece)])
            seen.tokens += piece

    def _note(self, seq_id: int, token: int) -> int:
        """Count ``token`` in; returns its position."""
        seen = self._seen[seq_id]
        seen.tokens.append(token)
        return len(seen.tokens) - 1

    def _compute(self, pieces: Sequence[tuple[int, int, list[int]]]) -> list[int]:
        """Sequence, position and tokens of each piece; returns the rows of their last tokens."""
        self._batch.clear()
        rows = [self._batch.add(seq_id, at, tokens, want_logits=1) for seq_id, at, tokens in pieces]
        self._context.decode(self._batch)
        return rows


def require_same_vocabulary(target: Model, draft: Model, gguf: Path) -> None:
    """Raise :class:`ConfigError` if a token does not stand for the same bytes in both models."""
    where = f"{gguf} cannot guess for this model - at [decode] draft_gguf"
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(f"it has {draft.vocab_size} tokens, the model {target.vocab_size}: {where}")
    for token in range(target.vocab_size):
        if draft.piece(token) != target.piece(token):
            raise ConfigError(
                f"token {token} is {draft.piece(token)!r} there and {target.piece(token)!r} here: {where}"
            )
