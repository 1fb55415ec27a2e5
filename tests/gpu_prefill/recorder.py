"""A sender that keeps what it is given, in place of the one that sends."""

from __future__ import annotations

import numpy as np

from transfer.frames import Element
from transfer.geometry import KVGeometry
from transfer.layout import Elements
from transfer.messages import Landing, Ticket


def make_ticket(number: int, **changes: object) -> Ticket:
    fields: dict[str, object] = {
        "request_id": f"request-{number}",
        "ticket": f"{number:032x}",
        "kv_endpoint": "tcp://127.0.0.1:1",
        "codec": "raw",
        "landing": Landing(cell_type="f16", rope_order="half"),
        "chunk_tokens": 64,
        "credit_chunks": 4,
        "deadline_ms": 60_000,
    }
    return Ticket(**(fields | changes))  # type: ignore[arg-type]


class RecordingSender:
    """Has KVSender's methods. Set ``refuse`` to fail every submit, ``backlog_bytes`` to feign a slow link.

    Payloads of other codecs than ``raw`` are kept as they are, in ``payloads``.
    """

    def __init__(self, geometry: KVGeometry, **_: object) -> None:
        self.geometry = geometry
        self.num_layers = geometry.num_layers
        self.groups: dict[tuple[str, int], list[Elements]] = {}
        self.payloads: dict[str, list[tuple[range, int, Elements]]] = {}
        self.slabs: list[tuple[str, range, range]] = []
        self.backlog_bytes = 0
        self.refuse = False
        self.opened: dict[str, Ticket] = {}
        self.chunks: dict[str, list[tuple[int, Elements]]] = {}
        self.finished: dict[str, int] = {}
        self.aborted: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.closed = self.staged = False

    def open(self, ticket: Ticket) -> None:
        assert ticket.ticket not in self.opened
        self.opened[ticket.ticket] = ticket
        self.chunks[ticket.ticket] = []

    def submit(
        self,
        ticket: str,
        tokens: range,
        first_layer: int,
        elements: Elements,
        element: Element,
        gather_ns: int,
        *,
        d2h_ns: int = 0,  # noqa: ARG002 - KVSender's signature
        encoded: bool = False,
    ) -> bool:
        assert ticket not in self.finished
        if encoded and self.opened[ticket].codec != "raw":
            self.payloads.setdefault(ticket, []).append((tokens, first_layer, elements.copy()))
            return True
        assert elements.size == elements.shape[0] * len(tokens) * self.geometry.elements_per_token // self.num_layers
        assert element in (Element.BF16, Element.F16)
        assert gather_ns > 0
        if self.refuse:
            self.failed[ticket] = "link is down"
            return False
        groups = self.groups.setdefault((ticket, tokens.start), [])
        assert first_layer == sum(map(len, groups))
        # What was staged is wanted back.
        groups.append(elements.copy())
        self.slabs.append((ticket, tokens, range(first_layer, first_layer + len(elements))))
        if first_layer + len(elements) == self.num_layers:
            self.chunks[ticket].append((tokens.start, np.concatenate(self.groups.pop((ticket, tokens.start)))))
        return True

    def finish(self, ticket: str, end_token: int) -> None:
        assert ticket not in self.finished
        assert not self.groups
        self.finished[ticket] = end_token

    def abort(self, ticket: str, reason: str) -> None:
        self.aborted[ticket] = reason

    def take_failed(self) -> dict[str, str]:
        failed, self.failed = self.failed, {}
        return failed

    def close(self, timeout_s: float = 2.0) -> None:  # noqa: ARG002 - KVSender's signature
        self.closed = True

    def tokens(self, ticket: str) -> list[int]:
        """Positions of every token that was submitted, in order."""
        per_token = self.geometry.elements_per_token
        return [start + i for start, elements in self.chunks[ticket] for i in range(elements.size // per_token)]

    def planes(self, ticket: str) -> tuple[np.ndarray, np.ndarray]:
        """K and V as float32 ``[num_layers, tokens, heads, dim]``; bf16 only."""
        geometry = self.geometry
        shape = (geometry.num_layers, 2, -1, geometry.num_kv_heads, geometry.head_dim_k)
        whole = np.concatenate([elements.reshape(shape) for _, elements in self.chunks[ticket]], axis=2)
        values = (whole.astype(np.uint32) << 16).view(np.float32)
        return values[:, 0], values[:, 1]
