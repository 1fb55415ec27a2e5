"""The client to the decode worker: one DEALER socket, a heartbeat, and a conversation for every request.

A session is one socket's life: connect, Hello, Welcome, then traffic. When it ends, for whatever reason, every
conversation in it fails at once, the socket goes with all that was queued on it, and a new session begins.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec
import structlog
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from proxy.block_index import BlockIndex
from proxy.breaker import Breaker
from proxy.load import Backlog, Occupancy
from proxy.placement import Candidate
from transfer.errors import CapacityError, IsthmusError, LinkError, ProtocolError, from_wire
from transfer.keys import ClientKeys, secure_client
from transfer.messages import (
    MAX_MESSAGE_BYTES,
    Abort,
    Failure,
    Hello,
    Message,
    Ping,
    Queued,
    Reserve,
    Start,
    Status,
    Ticket,
    Tokens,
    Welcome,
    decode_from_worker,
    encode,
    require_protocol,
)

HEARTBEAT_S = 1.0
SILENCE_S = 3.0
RETRY_S = 0.5
QUEUE_KNOWN_NS = 5_000_000_000
_HIGH_WATER_MESSAGES = 10_000
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL

T = TypeVar("T")
log = structlog.get_logger()


class Needs(NamedTuple):
    """What a request takes of a worker: cells and sequences, and the tokens that its steps are expected to look at."""

    cells: int
    sequences: int
    context_tokens: int


class Conversation:
    """One request's exchange with the worker: what it says arrives here until the request ends."""

    def __init__(self, node: DecodeNode, request_id: str, max_messages: int, needs: Needs) -> None:
        self.needs = needs
        self._node = node
        self._request_id = request_id
        self._max_messages = max_messages
        self._inbox: asyncio.Queue[Queued | Ticket | Tokens | IsthmusError] = asyncio.Queue()
        self._failed: asyncio.Future[IsthmusError] = asyncio.get_running_loop().create_future()
        self.finished = False

    async def reserve(self, reserve: Reserve, timeout_s: float, may_wait_s: float = 0.0) -> Ticket:
        """Ask for cells, and wait for them if the worker says that they will come.

        Raises what the worker answers if it refuses, :class:`LinkError` if it is silent for ``timeout_s``, and
        :class:`CapacityError` where waiting takes longer than ``may_wait_s``.
        """
        began_s = time.monotonic()
        await self._node.send(reserve)
        answer = await self._receive(timeout_s)
        while isinstance(answer, Queued):
            waited_s = time.monotonic() - began_s
            if waited_s + answer.wait_ms / 1e3 > may_wait_s:
                raise CapacityError(f"the decode worker is full, {answer.position} requests wait before this one")
            try:
                async with asyncio.timeout(may_wait_s - waited_s):
                    answer = await self._receive(None)
            except TimeoutError:
                raise CapacityError(f"the decode worker had no room for {may_wait_s:.3g} s") from None
        if not isinstance(answer, Ticket):
            raise ProtocolError("the decode worker sent Tokens before a Ticket")
        return answer

    @property
    def backlog(self) -> Backlog:
        """The worker's own prefills that this proxy has asked for."""
        return self._node.backlog

    @property
    def occupancy(self) -> Occupancy:
        """What the worker does for this proxy."""
        return self._node.occupancy

    async def start(self, first_token: int | None, *, first_text_sent: bool) -> None:
        """Tell the worker that prefill is done."""
        await self._node.send(
            Start(request_id=self._request_id, first_token=first_token, first_text_sent=first_text_sent)
        )

    async def start_local(self) -> None:
        """Tell the worker to compute what its cells lack of the prompt."""
        await self._node.send(Start(request_id=self._request_id, local=True))

    async def tokens(self, timeout_s: float) -> Tokens:
        """The next tokens; raises what the worker reports, and :class:`LinkError` after ``timeout_s`` of silence."""
        answer = await self._receive(timeout_s)
        if not isinstance(answer, Tokens):
            raise ProtocolError("the decode worker sent a second Ticket")
        self.finished = answer.report is not None
        return answer

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for ``work``, but give it up as soon as the worker fails the request or is lost."""
        task = asyncio.ensure_future(work)
        try:
            either: set[asyncio.Future[Any]] = {task, self._failed}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise self._failed.result()
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _receive(self, timeout_s: float | None) -> Queued | Ticket | Tokens:
        try:
            async with asyncio.timeout(timeout_s):
                message = await self._inbox.get()
        except TimeoutError:
            raise LinkError(f"the decode worker said nothing about this request for {timeout_s:.3g} s") from None
        if isinstance(message, IsthmusError):
            raise message
        return message

    def deliver(self, message: Queued | Ticket | Tokens) -> None:
        """Take in what the worker says; more messages than tokens were asked for are a failure."""
        if self._inbox.qsize() < self._max_messages:
            self._inbox.put_nowait(message)
        else:
            self.fail(ProtocolError("the decode worker sent more messages than tokens were asked for"))

    def fail(self, error: IsthmusError) -> None:
        """End the conversation with ``error``; what was delivered before can still be read."""
        if not self._failed.done():
            self._failed.set_result(error)
            self._inbox.put_nowait(error)


class DecodeNode:
    """The worker ``name`` at ``endpoint``, ``up`` while a session stands.

    ``welcome`` and ``status`` are what it said last; ``breaker`` counts the requests that it failed.

    With ``keys`` the session speaks CURVE.
    """

    def __init__(self, endpoint: str, keys: ClientKeys | None = None, name: str = "") -> None:
        self.endpoint = endpoint
        self.name = name or endpoint.removeprefix("tcp://")
        self.breaker = Breaker()
        # What it says where it announces itself; its status may not have come yet, or come no more.
        self.announced_draining = False
        # Codecs whose KV was found to be wrong in its cells, each with what was found (``parity.py``).
        self.distrusted: dict[str, str] = {}
        # How often such a codec has come back: KV that was kept before is not used any more.
        self.kv_era = 0
        self._keys = keys
        self.up = False
        self.welcome: Welcome | None = None
        self.status: Status | None = None
        self.index = BlockIndex()
        self.down_reason = "not connected yet"
        self.conversations: dict[str, Conversation] = {}
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._heard_ns = 0
        # Prefills of its own that this proxy has asked for; when it had no room; what it said of waiting, and when.
        self.backlog = Backlog()
        self.occupancy = Occupancy()
        self.refused_ns = 0
        self._queue: tuple[int, int] | None = None

    @property
    def open_sequences(self) -> int:
        """Sequences that decode there, or soon will."""
        running = self.status.running_sequences if self.status else 0
        return max(sum(each.needs.sequences for each in self.conversations.values()), running)

    @property
    def open_context_tokens(self) -> int:
        """The tokens that its steps look at, of this proxy's requests."""
        return sum(each.needs.context_tokens for each in self.conversations.values())

    def queue_left_ns(self, now_ns: int) -> int | None:
        """How long a request waits for cells, as the worker said last; None if that is too long ago."""
        if self._queue is None or now_ns - self._queue[1] > QUEUE_KNOWN_NS:
            return None
        wait_ns, said_ns = self._queue
        return max(0, wait_ns - (now_ns - said_ns))

    @property
    def draining(self) -> bool:
        """Whether the worker is about to end."""
        return self.announced_draining or (self.status is not None and self.status.draining)

    @property
    def takes_requests(self) -> bool:
        """Whether new requests may go there."""
        return self.up and not self.draining

    @property
    def state(self) -> Literal["up", "draining", "failing", "down"]:
        """In a word."""
        if not self.up:
            return "down"
        if self.draining:
            return "draining"
        return "failing" if self.breaker.failing(time.monotonic_ns()) else "up"

    @property
    def codecs(self) -> tuple[str, ...]:
        """How KV may travel there, the preferred codec first; none before it is up, and where no KV can be trusted."""
        possible = self.welcome.codecs if self.welcome else ()
        return tuple(codec for codec in possible if codec not in self.distrusted)

    def tenant(self, tenant: str) -> str:
        """The name under which the worker knows KV of ``tenant``."""
        return f"{tenant}/{self.kv_era}" if self.kv_era else tenant

    @property
    def away_reason(self) -> str:
        """Why new requests may not."""
        return self.down_reason if not self.up else "it is about to end"

    @property
    def candidate(self) -> Candidate:
        """What is free there: as its last status says, or less where this proxy has asked for more since."""
        if self.welcome is None:
            raise LinkError(f"the decode node is down: {self.down_reason}")
        status, open_here = self.status, self.conversations.values()
        cells = max(sum(each.needs.cells for each in open_here), status.used_cells if status else 0)
        sequences = max(sum(each.needs.sequences for each in open_here), status.reserved_sequences if status else 0)
        most = self.welcome.max_sequences
        return Candidate(self.name, self.welcome.num_cells - cells, most - sequences, sequences / most)

    def calls_itself(self, worker: str) -> bool:
        """Whether ``worker`` is the name that the worker gave when it was last heard."""
        return self.welcome is not None and self.welcome.worker == worker

    @asynccontextmanager
    async def conversation(
        self, request_id: str, max_tokens: int, *, cells: int = 0, sequences: int = 1, context_tokens: int = 0
    ) -> AsyncIterator[Conversation]:
        """Talk about one request, which needs ``cells`` and ``sequences``; steps look at ``context_tokens`` of it.

        Unless its last tokens have arrived, leaving the body aborts it on the worker.
        """
        if not self.up:
            raise LinkError(f"the decode node is down: {self.down_reason}")
        conversation = Conversation(self, request_id, max_tokens + 3, Needs(cells, sequences, context_tokens))
        self.conversations[request_id] = conversation
        try:
            yield conversation
        finally:
            del self.conversations[request_id]
            if not conversation.finished and self.up:
                await self._abort(request_id)

    async def send(self, message: Message) -> None:
        """Queue ``message`` for the worker; :class:`LinkError` if there is no session or its queue is full."""
        if self._socket is None:
            raise LinkError(f"the decode node is down: {self.down_reason}")
        data = encode(message)
        if len(data) > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
        try:
            await self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            raise LinkError("the decode worker does not take messages") from None

    async def run(self) -> None:
        """Keep a session with the worker until cancelled."""
        try:
            while True:
                await self._session()
                await asyncio.sleep(RETRY_S)
        finally:
            self._context.destroy(linger=0)

    async def _session(self) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.set_hwm(_HIGH_WATER_MESSAGES)
        socket.maxmsgsize = MAX_MESSAGE_BYTES
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | _REFUSED)
        reason: IsthmusError = LinkError("the proxy is stopping")
        try:
            if self._keys is not None:
                secure_client(socket, self._keys)
            socket.connect(self.endpoint)
            self._socket = socket
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(socket))
                tasks.create_task(self._beat())
                tasks.create_task(self._watch(monitor))
        except* IsthmusError as group:
            reason = next(error for error in group.exceptions if isinstance(error, IsthmusError))
        finally:
            self._lost(reason)
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close(linger=0)

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        # Waits where the connection is refused already: the monitor says why.
        await socket.send(encode(Hello()))
        while True:
            message = decode_from_worker(await socket.recv())
            self._heard_ns = time.monotonic_ns()
            match message:
                case Welcome():
                    self._welcomed(message)
                    await self.send(Ping(index_version=self.index.version))
                case Status():
                    self._take(message)
                case Queued():
                    self._queue = message.wait_ms * 1_000_000, self._heard_ns
                    self._deliver(message)
                case Failure(request_id=""):
                    raise from_wire(message.code, message.message)
                case _:
                    self._deliver(message)

    def _take(self, status: Status) -> None:
        self.status = msgspec.structs.replace(status, index=None)
        if status.index is not None:
            self.index.take(status.index)

    def _welcomed(self, welcome: Welcome) -> None:
        require_protocol(welcome.protocol)
        self.welcome = welcome
        self.index.clear()
        self.up = True
        log.info("decode node is up", name=self.name, endpoint=self.endpoint, worker=welcome.worker)

    def _deliver(self, message: Queued | Ticket | Tokens | Failure) -> None:
        conversation = self.conversations.get(message.request_id)
        if conversation is None:
            log.debug("message about a closed request", request_id=message.request_id, kind=type(message).__name__)
        elif isinstance(message, Failure):
            conversation.fail(from_wire(message.code, message.message, message.param))
        else:
            conversation.deliver(message)

    async def _beat(self) -> None:
        self._heard_ns = time.monotonic_ns()
        while True:
            if time.monotonic_ns() - self._heard_ns > SILENCE_S * 1e9:
                raise LinkError(f"no word from the decode worker for {SILENCE_S:g} s")
            if self.up:
                await self.send(Ping(index_version=self.index.version))
            await asyncio.sleep(HEARTBEAT_S)

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        event = (await recv_monitor_message(monitor))["event"]
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise LinkError("the decode worker does not let this proxy's key in")
        if event & _REFUSED:
            raise LinkError("the decode worker ended the handshake: both nodes need [keys] that belong together")
        raise LinkError("the decode worker closed the connection")

    async def _abort(self, request_id: str) -> None:
        try:
            await self.send(Abort(request_id=request_id))
        except LinkError as error:
            log.warning("abort did not go out", request_id=request_id, error=str(error))

    def _lost(self, reason: IsthmusError) -> None:
        if self.up or str(reason) != self.down_reason:
            log.warning("decode node is down", name=self.name, endpoint=self.endpoint, reason=str(reason))
        self.up = False
        self.status = None
        self.index.clear()
        self.announced_draining = False
        self._socket = None
        self.down_reason = str(reason)
        for conversation in self.conversations.values():
            conversation.fail(LinkError(f"the decode node was lost: {reason}"))
