"""What the engine tells the I/O thread; a request's tokens and its failure go straight to whoever asked for it."""

from __future__ import annotations

from cpu_decode.prefix import Block
from cpu_decode.reuse import Plan
from cpu_decode.state import ChunkState


class Prompted:
    """The cells of a request hold its whole prompt."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id


class Ended:
    """A request that was :class:`Prompted` has ended; its cells hold ``tokens`` until :meth:`Engine.leave`."""

    def __init__(self, request_id: str, tokens: list[int]) -> None:
        self.request_id = request_id
        self.tokens = tokens


class ChoiceFreed:
    """One of several choices has ended, and its cells are free; the request goes on."""

    def __init__(self, request_id: str, choice: int) -> None:
        self.request_id = request_id
        self.choice = choice


class Preempted:
    """A request has lost its cells for a while, until it is :class:`Prompted` again."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id


class Released:
    """The engine has let go of a request: its cells are free."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id


class Restored:
    """What ``plan`` says is in the cells of a request, or the request has ended."""

    def __init__(self, request_id: str, plan: Plan) -> None:
        self.request_id = request_id
        self.plan = plan


class Copied:
    """What could be copied of a request's KV is in ``blocks``."""

    def __init__(self, request_id: str, blocks: list[Block]) -> None:
        self.request_id = request_id
        self.blocks = blocks


class Injected:
    """A chunk is in the cells: its buffer is free."""

    def __init__(self, request_id: str, chunk: ChunkState) -> None:
        self.request_id = request_id
        self.chunk = chunk


class Settled:
    """All KV that came for a request is in its cells, and in no memory on the way any more. May be said twice."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id


Event = Prompted | Ended | ChoiceFreed | Preempted | Released | Restored | Copied | Injected | Settled
