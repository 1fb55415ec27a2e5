"""A decode worker without an engine: a real ROUTER in a thread that speaks the control messages and can misbehave."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import msgspec
import zmq

from transfer.geometry import KVGeometry
from transfer.messages import (
    PROTOCOL,
    Abort,
    Failure,
    FinishReason,
    Hello,
    Landing,
    Message,
    Ping,
    Queued,
    Reserve,
    Start,
    Status,
    Ticket,
    TokenLogprob,
    Tokens,
    Welcome,
    decode_to_worker,
    encode,
)
from transfer.stages import DecodeReport

GEOMETRY = KVGeometry(
    num_layers=2,
    num_kv_heads=1,
    head_dim_k=4,
    head_dim_v=4,
    rope_dims=4,
    rope_theta=10000.0,
    rope_scaling="none",
    sliding_window=0,
    vocab_size=300,
    model_fingerprint="0" * 16,
)
LANDING = Landing(cell_type="f16", rope_order="half")


@dataclass
class Script:
    """How the worker answers: the texts it streams, and what goes wrong."""

    texts: list[str] = field(default_factory=lambda: [" two", " three"])
    first_text: str = "one"
    finish_reason: FinishReason = "stop"
    protocol: int = PROTOCOL
    refuse_reserve: Failure | None = None
    fail_after_texts: int | None = None
    silent_after_start: bool = False
    kv_failure: Failure | None = None
    endless: bool = False
    # A Reserve waits for so long, says the worker; until this is None again.
    queue_ms: int | None = None
    prefill_tokens_per_s: float = 400.0
    draining: bool = False
    reused_tokens: int = 0
    wire_ns: int = 0
    # What it predicts after a prompt, by where the prompt's KV comes from.
    predicts: dict[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    # What it says where another node has begun the answer; and the ids of texts that others are to go on after.
    texts_after_another: list[str] = field(default_factory=lambda: [" four"])
    spelling: dict[str, list[int]] = field(default_factory=dict)
    # Its tokens are likelier than the others', and its answer ends in an exclamation mark.
    likeliest_choice: int | None = None


class FakeWorker:
    """Serves until :meth:`close`. ``said`` holds all that clients sent, ``open`` the reserved request ids."""

    def __init__(self, endpoint: str, name: str = "fake") -> None:
        self.name = name
        self.script = Script()
        self.said: list[Message] = []
        self._fail_session = threading.Event()
        self.open: dict[str, bytes] = {}
        self._prompts: dict[str, Reserve] = {}
        self._stop = threading.Event()
        self._mute = threading.Event()
        self._queued: dict[str, tuple[bytes, Reserve]] = {}
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.bind(endpoint)
        self._thread = threading.Thread(target=self._serve, name="fake worker")
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()
        self._context.term()

    def mute(self) -> None:
        """Hear and say nothing any more, with the connection standing."""
        self._mute.set()

    def fail_session(self) -> None:
        """End the session at its next heartbeat."""
        self._fail_session.set()

    def heard(self, kind: type[Message]) -> list[Message]:
        return [message for message in self.said if isinstance(message, kind)]

    def _serve(self) -> None:
        while not self._stop.is_set():
            if self._mute.is_set() or not self._socket.poll(20):
                self._stop.wait(0.005)
                self._stream_endlessly()
                while self.script.queue_ms is None and self._queued:
                    self._reserve(*self._queued.pop(next(iter(self._queued))))
                continue
            client, data = self._socket.recv_multipart()
            message = decode_to_worker(data)
            self.said.append(message)
            self._answer(client, message)

    def _stream_endlessly(self) -> None:
        for request_id, client in self.open.items():
            if self.script.endless and not self._mute.is_set() and self._started(request_id):
                self._say(client, Tokens(request_id=request_id, token_ids=[1], text="x"))

    def _started(self, request_id: str) -> bool:
        return any(message.request_id == request_id for message in self.said if isinstance(message, Start))

    def _say(self, client: bytes, message: Message) -> None:
        self._socket.send_multipart([client, encode(message)])

    def _answer(self, client: bytes, message: Message) -> None:
        match message:
            case Hello():
                self._say(client, self._welcome())
            case Ping() if self._fail_session.is_set():
                self._fail_session.clear()
                self._say(client, Failure(code="link_error", message="say hello again"))
            case Ping():
                self._say(client, self._status())
            case Reserve():
                self._reserve(client, message)
            case Start():
                self._start(client, message)
            case Abort():
                self._queued.pop(message.request_id, None)
                self.open.pop(message.request_id, None)

    def _welcome(self) -> Welcome:
        return Welcome(
            worker=self.name,
            geometry=GEOMETRY,
            landing=LANDING,
            codecs=("raw", "q8"),
            kv_endpoint="tcp://127.0.0.1:1",
            num_cells=1000,
            max_sequences=4,
            protocol=self.script.protocol,
        )

    def _status(self) -> Status:
        return Status(
            worker=self.name,
            used_cells=0,
            num_cells=1000,
            running_sequences=0,
            reserved_sequences=len(self.open),
            max_sequences=4,
            landing_bytes=0,
            prefill_tokens_per_s=self.script.prefill_tokens_per_s,
            prefill_basis="a fake measurement",
            draining=self.script.draining,
        )

    def _reserve(self, client: bytes, reserve: Reserve) -> None:
        if self.script.refuse_reserve:
            refusal = self.script.refuse_reserve
            self._say(client, msgspec.structs.replace(refusal, request_id=reserve.request_id))
            return
        if self.script.queue_ms is not None:
            self._queued[reserve.request_id] = client, reserve
            self._say(client, Queued(request_id=reserve.request_id, position=1, wait_ms=self.script.queue_ms))
            return
        self.open[reserve.request_id] = client
        self._prompts[reserve.request_id] = reserve
        ticket = Ticket(
            request_id=reserve.request_id,
            ticket="ab" * 16,
            kv_endpoint="tcp://127.0.0.1:1",
            codec=reserve.codec,
            landing=LANDING,
            chunk_tokens=512,
            credit_chunks=4,
            deadline_ms=reserve.deadline_ms,
            reused_tokens=self.script.reused_tokens,
        )
        self._say(client, ticket)

    def _start(self, client: bytes, start: Start) -> None:
        if self.script.silent_after_start or self.script.endless:
            return
        request_id = start.request_id
        if start.local:
            self._prompts[request_id] = msgspec.structs.replace(self._prompts[request_id], source="local")
        if self.script.kv_failure and self._prompts[request_id].source == "kv":
            self.open.pop(request_id)
            self._say(client, msgspec.structs.replace(self.script.kv_failure, request_id=request_id))
            return
        # Like the real one: the first token's text is the worker's to stream unless the client has it.
        texts = list(self.script.texts)
        if not start.first_text_sent:
            texts.insert(0, self.script.first_text)
        if self._prompts[request_id].prior_output:
            texts = self.script.texts_after_another
        for number, text in enumerate(texts):
            if number == self.script.fail_after_texts:
                self.open.pop(request_id)
                self._say(client, Failure(code="engine_error", message="llama.cpp fell over", request_id=request_id))
                return
            known = number == 0 and not start.first_text_sent and start.first_token is not None
            for choice in range(self._prompts[request_id].choices):
                logprobs = () if known else self._logprobs(request_id, number, choice)
                ids = self.script.spelling.get(text, [number])
                if number == 0 and start.first_text_sent and start.first_token is not None:
                    # Like the real one: the client has the text, but the token is this worker's to count.
                    ids = [start.first_token, *ids]
                tokens = Tokens(request_id=request_id, token_ids=ids, text=text, choice=choice, logprobs=logprobs)
                self._say(client, tokens)
        self.open.pop(request_id)
        reserve = self._prompts[request_id]
        for choice in range(reserve.choices - 1):
            text = "!" if choice == self.script.likeliest_choice else ""
            ending = Tokens(
                request_id=request_id, token_ids=[], text=text, choice=choice, finish_reason=self.script.finish_reason
            )
            self._say(client, ending)
        self._say(client, self._last(reserve, reserve.choices * (1 + len(self.script.texts))))

    def _logprobs(self, request_id: str, token: int, choice: int) -> tuple[TokenLogprob, ...]:
        """What the request asked for: -0.25 for each token (-0.125 if likeliest), with token 9 behind it."""
        num_top = self._prompts[request_id].sampling.logprobs
        if num_top is None:
            return ()
        if predicted := self.script.predicts.get(self._prompts[request_id].source):
            return (TokenLogprob(token, predicted[0][1], predicted[:num_top]),)
        logprob = -0.125 if choice == self.script.likeliest_choice else -0.25
        return (TokenLogprob(token, logprob, ((token, logprob), (9, -2.0))[:num_top]),)

    def _last(self, reserve: Reserve, completion_tokens: int) -> Tokens:
        local = reserve.source == "local"
        report = DecodeReport(
            prompt_tokens=len(reserve.prompt),
            completion_tokens=completion_tokens,
            kv_raw_bytes=0 if local else 4096,
            kv_wire_bytes=0 if local else 2048,
            wire_ns=0 if local else self.script.wire_ns,
            transfer_exposed_ns=0 if local else 1_000_000,
            landing_tail_ns=0 if local else 400_000,
            local_prefill_ns=5_000_000 if local else 0,
            decode_ns=3_000_000,
        )
        return Tokens(
            request_id=reserve.request_id,
            token_ids=[],
            text="",
            choice=reserve.choices - 1,
            finish_reason=self.script.finish_reason,
            report=report,
        )
