"""Control messages: what proxy, prefill node and decode worker say to each other, as tagged msgpack structs.

Three conversations use them, all over ZeroMQ DEALER to ROUTER, one message a ZeroMQ frame; what a step has brought for
one client a worker sends as the frames of one ZeroMQ message. In two the decode worker is the ROUTER and the others are
its clients:

============  ======================================  ====================================================
conversation  client to worker                        worker to client
============  ======================================  ====================================================
control       Hello, Reserve, Start, Abort, Ping      Welcome, Queued, Ticket, Tokens, Failure, Status
KV control    SenderHello                             SenderWelcome, Credit, Resend, Landed, Cancel, Failure
============  ======================================  ====================================================

In the third the worker is the DEALER: it tells the proxy's registry every second that it is there (Announce) and hears
nothing back. With keys the worker is the CURVE server there too, although it connects: it proves the workers' key and
lets in proxies only.

KV itself goes one way, in frames (``frames.py``) over a PUSH to the worker's PULL socket, which SenderWelcome names.

Rules of change: new fields get defaults; a field never changes its meaning or type; a new message is a new tag, which
older peers refuse by name. Raise ``PROTOCOL`` when an old peer could misunderstand, not merely miss, what is said.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

from transfer.errors import ProtocolError
from transfer.geometry import KVGeometry
from transfer.layout import CellType, RopeOrder
from transfer.seal import SealName
from transfer.shares import Share
from transfer.stages import DecodeReport

PROTOCOL = 2
MAX_MESSAGE_BYTES = 8 << 20
TICKET_BYTES = 16

FinishReason = Literal["stop", "length"]
T = TypeVar("T")


class Landing(msgspec.Struct, frozen=True, kw_only=True):
    """The form in which a decode worker wants KV: what its cells hold and how it pairs rotary elements."""

    cell_type: CellType
    rope_order: RopeOrder


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How to pick tokens; OpenAI's names, plus those of vLLM, plus llama.cpp's DRY, XTC and typical sampling.

    ``top_k`` 0 is off. ``seed`` None means unseeded. ``logprobs`` is how many alternatives to report with each token's
    own log probability; None reports nothing. At most one of ``json_schema`` (a JSON schema as JSON), ``grammar``
    (llama.cpp's GBNF, or llguidance's Lark) and ``regex`` (for all of it) constrains the output. DRY is off at
    ``dry_multiplier`` 0, XTC at ``xtc_probability`` 0.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    typical_p: float = 1.0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    json_schema: str = ""
    grammar: str = ""
    regex: str = ""
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")

    @property
    def constrained(self) -> bool:
        """Whether something constrains the output."""
        return bool(self.json_schema or self.grammar or self.regex)


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural log of a token's probability before penalties and truncation, and the likeliest tokens' in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages; the tag is the class name."""


class Hello(Message, frozen=True, kw_only=True):
    """Opens a control conversation. ``geometry`` is compared when the client knows the model (the proxy does not)."""

    protocol: int = PROTOCOL
    geometry: KVGeometry | None = None


class Welcome(Message, frozen=True, kw_only=True):
    """The worker's answer to Hello: who it is, what it holds and what it can take.

    ``pool_seed`` is what the names of its KV blocks begin with (``blocks.py``). One sequence may hold
    ``sequence_cells`` of its ``num_cells``; 0: all. A worker that takes no KV has the geometry ``NO_KV`` and no codecs.
    """

    worker: str
    geometry: KVGeometry
    landing: Landing
    codecs: tuple[str, ...]
    kv_endpoint: str
    num_cells: int
    max_sequences: int
    protocol: int = PROTOCOL
    pool_seed: bytes = b""
    sequence_cells: int = 0


class Reserve(Message, frozen=True, kw_only=True):
    """Pin cells for a request. ``source`` says where the prompt's KV will come from: the wire, or a local prefill.

    ``choices`` answers share the prompt's cells, each with ``max_tokens`` of its own. The last ``prior_output`` tokens
    of the prompt are the beginning of the answer, made elsewhere: what looks at output counts them in;
    ``max_tokens`` and ``min_tokens`` are of what is still to come. Without ``reuse`` no KV of another request
    serves this one, nor its KV others. Prefixes are shared within a ``tenant`` (an opaque name) only.
    """

    request_id: str
    prompt: list[int]
    sampling: Sampling
    source: Literal["kv", "local"]
    codec: str = "raw"
    deadline_ms: int = 60_000
    choices: int = 1
    prior_output: int = 0
    reuse: bool = True
    tenant: str = ""


class Ticket(Message, frozen=True, kw_only=True):
    """A reserved landing place. The proxy hands it to the prefill node as ``kv_transfer_params["isthmus"]``.

    ``ticket`` is 32 hex digits; ``kv_endpoint`` is where SenderHello goes. The sender may have ``credit_chunks`` chunks
    of at most ``chunk_tokens`` tokens in flight until a Credit raises the number. Tokens before ``reused_tokens``, at
    most all but the prompt's last one, are already in the worker's cells and are not to be sent.
    """

    request_id: str
    ticket: str
    kv_endpoint: str
    codec: str
    landing: Landing
    chunk_tokens: int
    credit_chunks: int
    deadline_ms: int
    reused_tokens: int = 0


class Queued(Message, frozen=True, kw_only=True):
    """A Reserve waits for cells, ``position`` requests before it; ``wait_ms`` is the worker's guess, 0 if it has none.

    A Ticket or a Failure follows.
    """

    request_id: str
    position: int
    wait_ms: int = 0


class Start(Message, frozen=True, kw_only=True):
    """Prefill is done; join the batch when the KV is complete.

    With ``first_token`` the worker continues after it; without, it samples the first token itself. If
    ``first_text_sent``, the client has that token's text already and the worker streams only what follows.
    With ``local`` no KV will come, or no more of it: the worker computes what its cells lack.
    """

    request_id: str
    first_token: int | None = None
    first_text_sent: bool = False
    local: bool = False


class Abort(Message, frozen=True, kw_only=True):
    """Forget a request: cells and buffers are released within one step."""

    request_id: str


class Tokens(Message, frozen=True, kw_only=True):
    """Newly sampled tokens of one choice and the text they complete.

    A choice's last message carries its ``finish_reason``, the request's last one also the ``report``. ``logprobs``
    are those of the last tokens in ``token_ids``: a first token that came with Start has none here.
    """

    request_id: str
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None = None
    report: DecodeReport | None = None
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


class Failure(Message, frozen=True, kw_only=True):
    """A request or handshake failed; ``code`` is an error class's code (``transfer/errors.py``), ``param`` a field."""

    code: str
    message: str
    request_id: str = ""
    param: str | None = None


class Ping(Message, frozen=True, kw_only=True):
    """Asks for a Status; doubles as the heartbeat.

    ``index_version`` is the version of the worker's prefix index that the client knows, 0 if none, -1 if it wants none.
    """

    index_version: int = -1


class TierStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One place for KV: what it holds, what it has given back, and how fast it was.

    ``evictions`` blocks had to go; ``evicted`` says how many for each reason, ``refused`` how many never got in.
    """

    name: str
    used_bytes: int
    capacity_bytes: int
    blocks: int
    hits: int = 0
    hit_tokens: int = 0
    evictions: int = 0
    corrupt_blocks: int = 0
    read_bytes_per_s: float = 0.0
    evicted: dict[str, int] = {}
    refused: dict[str, int] = {}


class IndexUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """What has changed in a worker's prefix index since ``base_version``; 0: this is all of it.

    Blocks are named by the first 8 bytes of their chained hash; ``added`` has those that a tier now holds, by tier.
    """

    base_version: int
    version: int
    added: dict[str, list[bytes]] = {}
    removed: list[bytes] = []


class Status(Message, frozen=True, kw_only=True):
    """The worker's load, and how fast it prefills on its own (tokens per second, with the sample behind it).

    A ``draining`` worker takes no new requests. ``remote_memory_fraction`` is the share of a bound worker's memory that
    lies outside its NUMA node. ``retained_bytes`` of KV of ``retained_sequences`` prefixes are kept for prompts that
    begin the same: so far ``prefix_hits`` requests have reused ``reused_tokens`` tokens of it, or of running sequences.

    ``queued_requests`` wait for cells, ``preempted_sequences`` have lost theirs and wait in RAM.
    ``decode_tokens_per_s`` is of the last second; ``step_ns`` is how long its steps without prefill took, with
    ``step_sequences`` sequences that had ``step_context_tokens`` tokens in all, and ``step_read_bytes_per_s`` the
    weights and KV that such a step reads; ``memory_bytes_per_s`` is what the memory can do (all 0 where unknown).
    ``drafted_tokens`` and ``accepted_tokens`` count speculation so far. ``package_watts`` and ``dram_watts`` are the
    mean power of the processor packages that the worker may run on, ``power_of`` their names; None where unknown.
    """

    worker: str
    used_cells: int
    num_cells: int
    running_sequences: int
    reserved_sequences: int
    max_sequences: int
    landing_bytes: int
    prefill_tokens_per_s: float
    prefill_basis: str
    remote_memory_fraction: float = 0.0
    draining: bool = False
    retained_bytes: int = 0
    retained_sequences: int = 0
    prefix_hits: int = 0
    reused_tokens: int = 0
    queued_requests: int = 0
    preempted_sequences: int = 0
    decode_tokens_per_s: float = 0.0
    step_ns: int = 0
    step_sequences: float = 0.0
    step_context_tokens: float = 0.0
    step_read_bytes_per_s: float = 0.0
    memory_bytes_per_s: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    package_watts: float | None = None
    dram_watts: float | None = None
    power_of: str = ""
    tiers: tuple[TierStatus, ...] = ()
    index: IndexUpdate | None = None


class Announce(Message, frozen=True, kw_only=True):
    """A worker is there: proxies find it at ``control_endpoint``. A ``draining`` one takes no new requests."""

    worker: str
    control_endpoint: str
    draining: bool = False
    protocol: int = PROTOCOL


class SenderHello(Message, frozen=True, kw_only=True):
    """Opens a KV conversation: the prefill node's geometry and the codecs it can encode.

    Said again whenever the sender doubts that it is known; ``renew`` asks for a fresh session. ``share`` is what this
    sender has of every transfer, if others send the rest; the geometry is the whole model's all the same.
    """

    geometry: KVGeometry
    codecs: tuple[str, ...]
    renew: bool = False
    protocol: int = PROTOCOL
    share: Share | None = None


class SenderWelcome(Message, frozen=True, kw_only=True):
    """The worker accepts this sender's frames on ``frames_port`` of the same host, as ``session``.

    No frame may carry more than ``max_frame_bytes`` of elements. ``key`` (16 bytes, empty if ``seal`` is "none") seals
    this session's frames and no others; it is only ever sent over CURVE. ``share`` is SenderHello's, understood.
    """

    session: int
    frames_port: int
    max_frame_bytes: int
    seal: SealName = "none"
    key: bytes = b""
    protocol: int = PROTOCOL
    share: Share | None = None


class Credit(Message, frozen=True, kw_only=True):
    """The sender may have sent ``chunks`` chunks in all on ``ticket``; frames before ``next_sequence`` landed."""

    ticket: str
    chunks: int
    next_sequence: int


class Resend(Message, frozen=True, kw_only=True):
    """Frames of ``ticket`` from ``sequence`` on are lost: go back to it."""

    ticket: str
    sequence: int


class Landed(Message, frozen=True, kw_only=True):
    """All of ``ticket`` has landed; the sender may forget it."""

    ticket: str


class Cancel(Message, frozen=True, kw_only=True):
    """The worker no longer wants ``ticket``; drop what is queued for it."""

    ticket: str
    reason: str


ToWorker = Hello | Reserve | Start | Abort | Ping
FromWorker = Welcome | Queued | Ticket | Tokens | Failure | Status
ToRegistry = Announce
ToReceiver = SenderHello
FromReceiver = SenderWelcome | Credit | Resend | Landed | Cancel | Failure

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
_to_registry: msgspec.msgpack.Decoder[ToRegistry] = msgspec.msgpack.Decoder(ToRegistry)
_to_receiver: msgspec.msgpack.Decoder[ToReceiver] = msgspec.msgpack.Decoder(ToReceiver)
_from_receiver: msgspec.msgpack.Decoder[FromReceiver] = msgspec.msgpack.Decoder(FromReceiver)


def encode(message: Message) -> bytes:
    """One message as msgpack."""
    return _encoder.encode(message)


def decode_to_worker(data: bytes | memoryview) -> ToWorker:
    """Parse what a control client sent; :class:`ProtocolError` if it is not one of ``ToWorker``."""
    return _decode(_to_worker, data)


def decode_from_worker(data: bytes | memoryview) -> FromWorker:
    """Parse what a worker sent on its control socket; :class:`ProtocolError` if it is not one of ``FromWorker``."""
    return _decode(_from_worker, data)


def decode_to_registry(data: bytes | memoryview) -> ToRegistry:
    """Parse what a worker told a proxy's registry; :class:`ProtocolError` if it is not one of ``ToRegistry``."""
    return _decode(_to_registry, data)


def decode_to_receiver(data: bytes | memoryview) -> ToReceiver:
    """Parse a sender's message on the KV plane; :class:`ProtocolError` if it is not one of ``ToReceiver``."""
    return _decode(_to_receiver, data)


def decode_from_receiver(data: bytes | memoryview) -> FromReceiver:
    """Parse a worker's message on the KV plane; :class:`ProtocolError` if it is not one of ``FromReceiver``."""
    return _decode(_from_receiver, data)


def require_protocol(theirs: int) -> None:
    """Refuse a peer of another protocol version."""
    if theirs != PROTOCOL:
        raise ProtocolError(f"protocol version differs: {PROTOCOL} here, {theirs} there; upgrade the older node")


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes | memoryview) -> T:
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"message does not parse: {error}") from None
