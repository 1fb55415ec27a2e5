"""What a client has of an answer, so that another node can go on with it and nobody sees the seam."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from proxy.handoff import Job, Piece
from proxy.vocabulary import Vocabulary
from transfer.messages import FinishReason
from transfer.text import TextStream


class Transcript:
    """Follows the pieces of an answer to ``job``. Up to the first seam it passes them on as they are.

    After it the text is made here, from token ids: an engine that goes on knows neither the bytes of a character that
    the one before it left incomplete, nor what may be the beginning of a stop string.
    """

    def __init__(self, job: Job, vocabulary: Vocabulary) -> None:
        self._job = job
        self._vocabulary = vocabulary
        self._ids: list[int] = []
        # All that was given to the client; and, after a seam, all that may be given.
        self._text = ""
        self._whole = ""
        self._stream: TextStream | None = None
        self._begun = False
        # The end has been told, perhaps before the engine knows: of a stop string that began before the seam.
        self.ended = False

    @property
    def num_tokens(self) -> int:
        """Tokens that are known, whether or not their text is out."""
        return len(self._ids)

    @property
    def left_tokens(self) -> int:
        """Tokens that may still come."""
        return self._job.sampling.max_tokens - len(self._ids)

    def take(self, piece: Piece) -> Piece:
        """``piece`` as the client gets it. After a seam it may end the answer before the engine knows."""
        self._begun = True
        before = len(self._ids)
        self._ids += piece.token_ids
        if self._stream is None:
            self._text += piece.text
            return piece
        shown = piece.token_ids
        if piece.finish_reason == "stop" and shown and shown[-1] in self._job.sampling.stop_token_ids:
            shown = shown[:-1]
        self._push(self._stream, shown, before)
        if piece.finish_reason and not self._stream.stopped:
            self._whole += self._stream.flush()
        text, self._text = self._whole[len(self._text) :], max(self._text, self._whole, key=len)
        reason: FinishReason | None = "stop" if self._stream.stopped else piece.finish_reason
        self.ended = reason is not None
        return piece._replace(text=text, finish_reason=reason)

    def end(self) -> Piece:
        """The last piece, where the tokens ran out just before the seam."""
        return self.take(Piece("", "length"))

    def rest(self) -> Job | None:
        """What another node is to do; None where it cannot go on without being noticed.

        That is where several choices have begun, or the client has a text that its tokens do not spell.
        """
        if not self._begun:
            return self._job
        if self._job.choices > 1 or self._job.echo or not self._cut():
            return None
        sampling, done = self._job.sampling, len(self._ids)
        return self._job._replace(
            prompt=[*self._job.prompt, *self._ids],
            prior_output=done,
            sampling=msgspec.structs.replace(
                sampling,
                max_tokens=sampling.max_tokens - done,
                min_tokens=max(0, sampling.min_tokens - done),
                # Not the same random numbers again; any others are as good.
                seed=None if sampling.seed is None else sampling.seed - done,
            ),
        )

    def _cut(self) -> bool:
        """Begin to make the text here; False if what is known does not add up."""
        self._whole, self._stream = "", TextStream(self._job.sampling.stop)
        self._push(self._stream, self._ids, 0)
        return self._whole.startswith(self._text) and not self._stream.stopped

    def _push(self, stream: TextStream, token_ids: Sequence[int], before: int) -> None:
        """Take in the tokens that follow the first ``before`` ones of the answer."""
        for number, token in enumerate(token_ids, before + 1):
            if not stream.stopped:
                may_stop = number > self._job.sampling.min_tokens
                self._whole += stream.push(self._vocabulary.shown(token), may_stop=may_stop)
