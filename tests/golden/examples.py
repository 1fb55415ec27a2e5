"""One example of everything that goes over the wire; ``frames.hex`` and ``messages.hex`` hold their frozen bytes."""

import msgspec
import numpy as np

from transfer import messages
from transfer.codecs import CODECS
from transfer.frames import Element, Header, Kind
from transfer.geometry import KVGeometry
from transfer.layout import Slab
from transfer.seal import Seal
from transfer.stages import DecodeReport, SenderReport

TICKET = bytes(range(16))
# Two octaves of both signs, with zero and a subnormal: no two codecs or element types give the same bytes.
ELEMENTS = np.concatenate([np.arange(0x3F00, 0x3F80, 4), np.arange(0xBE00, 0xBE80, 4)]).astype(np.uint16)
ELEMENTS[:2] = 0, 1

GEOMETRY = KVGeometry(
    model_fingerprint="0123456789abcdef",
    num_layers=2,
    num_kv_heads=1,
    head_dim_k=8,
    head_dim_v=8,
    rope_dims=8,
    rope_theta=10000.0,
    rope_scaling="none",
    sliding_window=0,
    vocab_size=256,
)
WIDE = msgspec.structs.replace(GEOMETRY, head_dim_k=64, head_dim_v=64)
LANDING = messages.Landing(cell_type="f16", rope_order="interleaved")
SAMPLING = messages.Sampling(max_tokens=8, temperature=0.5, seed=7, logit_bias={3: -1.5}, stop=("\n",))
SENDER_REPORT = SenderReport(
    num_tokens=2, num_frames=1, kv_raw_bytes=128, kv_wire_bytes=192, gather_ns=1, encode_ns=2, d2h_ns=3
)
DECODE_REPORT = DecodeReport(prompt_tokens=2, completion_tokens=1, kv_raw_bytes=128, kv_wire_bytes=192, wire_ns=4)


def _data(codec: str, element: Element) -> tuple[Header, bytes]:
    # A plane must hold a whole block of 32, and a row of quantized cells a whole head of 64.
    num_tokens, num_layers = {"q8": (4, 1), "k8v4": (4, 1)}.get(codec, (1, 1) if codec.startswith("rows") else (2, 2))
    geometry, elements = (WIDE, np.tile(ELEMENTS, 2)) if codec.startswith("rows") else (GEOMETRY, ELEMENTS)
    header = Header(
        kind=Kind.DATA,
        ticket=TICKET,
        sequence=3,
        codec=CODECS[codec].wire_id,
        element=element,
        start_token=512,
        num_tokens=num_tokens,
        first_layer=0,
        num_layers=num_layers,
    )
    slab = Slab(geometry, num_layers, range(512, 512 + num_tokens))
    return header, bytes(CODECS[codec].encode(elements, element, slab))


def frames() -> dict[str, tuple[Header, bytes]]:
    """Header and payload by name."""
    data = {f"{codec}-{e.name.lower()}": _data(codec, e) for codec in CODECS for e in (Element.BF16, Element.F16)}
    return data | {
        "end": (
            Header(kind=Kind.END, ticket=TICKET, sequence=4, num_tokens=2),
            msgspec.msgpack.encode(SENDER_REPORT),
        ),
        "probe": (Header(kind=Kind.PROBE, ticket=TICKET, sequence=4), b""),
        "sealed": (
            Header(kind=Kind.PROBE, ticket=TICKET, sequence=4, seal=Seal.AES_GCM, session=515),
            b"",
        ),
        "abort": (Header(kind=Kind.ABORT, ticket=TICKET, sequence=4), "größer als der Vorrat".encode()),
    }


MESSAGES: tuple[messages.Message, ...] = (
    messages.Hello(geometry=GEOMETRY),
    messages.Welcome(
        worker="decode-0",
        geometry=GEOMETRY,
        landing=LANDING,
        codecs=("raw", "q8"),
        kv_endpoint="tcp://127.0.0.1:8103",
        num_cells=16384,
        max_sequences=16,
    ),
    messages.Reserve(request_id="r-1", prompt=[1, 2, 255], sampling=SAMPLING, source="kv", codec="q8"),
    messages.Ticket(
        request_id="r-1",
        ticket=TICKET.hex(),
        kv_endpoint="tcp://127.0.0.1:8103",
        codec="q8",
        landing=LANDING,
        chunk_tokens=512,
        credit_chunks=4,
        deadline_ms=60_000,
        reused_tokens=64,
    ),
    messages.Queued(request_id="r-1", position=3, wait_ms=250),
    messages.Start(request_id="r-1", first_token=42, first_text_sent=True),
    messages.Abort(request_id="r-1"),
    messages.Tokens(request_id="r-1", token_ids=[42, 7], text="é", finish_reason="stop", report=DECODE_REPORT),
    messages.Failure(code="link_error", message="gone", request_id="r-1"),
    messages.Ping(),
    messages.Status(
        worker="decode-0",
        used_cells=100,
        num_cells=16384,
        running_sequences=1,
        reserved_sequences=2,
        max_sequences=16,
        landing_bytes=4096,
        prefill_tokens_per_s=410.5,
        prefill_basis="3 prefills",
    ),
    messages.Announce(worker="decode-0", control_endpoint="tcp://127.0.0.1:8102", draining=True),
    messages.SenderHello(geometry=GEOMETRY, codecs=("raw", "lz4", "q8")),
    messages.SenderWelcome(
        session=515, frames_port=8103, max_frame_bytes=4 << 20, seal="aes-gcm", key=bytes(range(16, 32))
    ),
    messages.Credit(ticket=TICKET.hex(), chunks=6, next_sequence=9),
    messages.Resend(ticket=TICKET.hex(), sequence=7),
    messages.Landed(ticket=TICKET.hex()),
    messages.Cancel(ticket=TICKET.hex(), reason="aborted"),
)
