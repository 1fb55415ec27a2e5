"""A control client for tests: plain blocking calls over a DEALER socket."""

from __future__ import annotations

import itertools
import time

import zmq

from transfer.errors import from_wire
from transfer.keys import ClientKeys, secure_client
from transfer.messages import (
    Abort,
    Failure,
    FromWorker,
    Message,
    Ping,
    Reserve,
    Sampling,
    Start,
    Status,
    Ticket,
    Tokens,
    decode_from_worker,
    encode,
)

PING_S = 2.0
_ids = itertools.count()


class WorkerClient:
    """Speaks the control protocol to one worker; every wait is bounded."""

    def __init__(self, port: int, keys: ClientKeys, patience_s: int = 180) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        secure_client(self._socket, keys)
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        self._early: list[FromWorker] = []
        self._patience_s = patience_s
        self._pinged_s = time.monotonic()
        self._unasked = 0

    def ask(self, message: Message) -> FromWorker:
        """Send and return the next message that is about no request: a late word on an ended one is no answer."""
        self._socket.send(encode(message))
        return self._wait_for(lambda answer: not getattr(answer, "request_id", ""))

    def send(self, message: Message) -> None:
        self._socket.send(encode(message))

    def status(self) -> Status:
        self._socket.send(encode(Ping()))
        return self._wait_for(lambda message: isinstance(message, Status))

    def reserve(self, prompt: list[int], sampling: Sampling, source: str, **more: object) -> Ticket:
        request_id = f"r{next(_ids)}"
        self._socket.send(
            encode(Reserve(request_id=request_id, prompt=prompt, sampling=sampling, source=source, **more))
        )
        answer = self._wait_for(lambda message: getattr(message, "request_id", None) == request_id)
        if isinstance(answer, Failure):
            raise from_wire(answer.code, answer.message)
        assert isinstance(answer, Ticket)
        return answer

    def start(self, ticket: Ticket, first_token: int | None = None, *, first_text_sent: bool = False) -> None:
        self.send(Start(request_id=ticket.request_id, first_token=first_token, first_text_sent=first_text_sent))

    def abort(self, ticket: Ticket) -> None:
        self.send(Abort(request_id=ticket.request_id))

    def collect(self, ticket: Ticket) -> tuple[list[int], str, Tokens]:
        """All token ids and text of a request, and its last message; raises what the worker reports."""
        ids: list[int] = []
        text = ""
        while True:
            message = self.next_tokens(ticket)
            ids += message.token_ids
            text += message.text
            if message.finish_reason:
                return ids, text, message

    def next_tokens(self, ticket: Ticket) -> Tokens:
        """The next tokens of a request; raises what the worker reports instead."""
        message = self._wait_for(lambda message: getattr(message, "request_id", None) == ticket.request_id)
        if isinstance(message, Failure):
            raise from_wire(message.code, message.message)
        assert isinstance(message, Tokens)
        return message

    def listen(self) -> FromWorker:
        """The next message about any request."""
        return self._next()

    def listen_to_all(self) -> list[FromWorker]:
        """All that comes at once."""
        return [self._next(), *(self._next_from_socket() for _ in iter(lambda: self._socket.rcvmore, 0))]

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def _wait_for(self, wanted):  # type: ignore[no-untyped-def]
        for index, message in enumerate(self._early):
            if wanted(message):
                return self._early.pop(index)
        while not wanted(message := self._next_from_socket()):
            self._early.append(message)
        return message

    def _next(self) -> FromWorker:
        return self._early.pop(0) if self._early else self._next_from_socket()

    def _next_from_socket(self) -> FromWorker:
        """The next message; meanwhile the worker hears that somebody listens, and its answers to that are dropped."""
        for _ in range(self._patience_s):
            if time.monotonic() > self._pinged_s + PING_S:
                self._pinged_s = time.monotonic()
                self.send(Ping())
                self._unasked += 1
            if not self._socket.poll(1000):
                continue
            message = decode_from_worker(self._socket.recv())
            if not self._unasked or not isinstance(message, Status):
                return message
            self._unasked -= 1
        raise TimeoutError("the worker says nothing")
