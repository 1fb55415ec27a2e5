"""The scheduler's half of exporting: which tokens of which request leave in which step.

Plain bookkeeping without vLLM; ``connector.py`` feeds it from vLLM's hooks. A step's :class:`StepPlan` travels to the
worker, whose half is ``export.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
import structlog

from transfer import codecs
from transfer.errors import IsthmusError, ProtocolError, RequestError
from transfer.messages import Ticket
from transfer.outgoing import ticket_key

log = structlog.get_logger()

PARAMS_KEY = "isthmus"
# Enough to recognise a ticket's second use long after its first request has left.
MAX_REMEMBERED_TICKETS = 4096


@dataclass(frozen=True)
class Job:
    """Export tokens ``[start, end)`` of a request whose tokens lie in ``block_ids``, in order."""

    ticket: str
    start: int
    end: int
    block_ids: tuple[int, ...]
    chunk_tokens: int
    interleave: bool


@dataclass
class StepPlan:
    """What the worker does in one step.

    ``opened`` are transfers that begin, ``ended`` maps finished tickets to the position after their last token,
    ``aborted`` maps tickets to why. ``idle``: nothing computes, and requests wait only for the backlog to shrink.
    """

    opened: list[Ticket] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    ended: dict[str, int] = field(default_factory=dict)
    aborted: dict[str, str] = field(default_factory=dict)
    idle: bool = False


@dataclass
class Export:
    """One request's export: ``exported`` is the position up to which its tokens were handed to the worker."""

    ticket: Ticket
    prompt_tokens: int
    exported: int
    block_ids: list[int] = field(default_factory=list)
    opened: bool = False
    ended: bool = False
    failure: str = ""


class ExportSchedule:
    """Every request with a ticket, from admission to finish. Request ids are vLLM's own."""

    def __init__(self, max_backlog_bytes: int) -> None:
        self._max_backlog_bytes = max_backlog_bytes
        self._backlog_bytes = 0
        self._exports: dict[str, Export] = {}
        self._request_of: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self._remembered: OrderedDict[str, None] = OrderedDict()
        self._aborted: dict[str, str] = {}
        self._deferred = False

    def __len__(self) -> int:
        return len(self._exports) + len(self._refused)

    def admit(self, request_id: str, params: object, prompt_tokens: int) -> None:
        """Note a new request. ``params`` are its ``kv_transfer_params``; without our key it exports nothing.

        A ticket that is malformed or was used before is refused: the request runs, and its answer says why.
        """
        if not isinstance(params, Mapping) or PARAMS_KEY not in params:
            return
        try:
            ticket = _read_ticket(params[PARAMS_KEY], prompt_tokens)
            if ticket.ticket in self._remembered:
                raise RequestError("ticket was used before; n > 1 and several prompts need a ticket each", "ticket")
        except IsthmusError as error:
            log.warning("ticket refused", request_id=request_id, reason=str(error))
            self._refused[request_id] = str(error)
            return
        self._remember(ticket.ticket)
        self._exports[request_id] = Export(ticket, prompt_tokens, exported=ticket.reused_tokens)
        self._request_of[ticket.ticket] = request_id

    def must_wait(self, request_id: str) -> bool:
        """Whether a request should be scheduled later because the worker's backlog is over half its limit."""
        full = request_id in self._exports and self._backlog_bytes > self._max_backlog_bytes // 2
        self._deferred |= full
        return full

    def place(self, request_id: str, block_ids: Iterable[int]) -> None:
        """Set a request's block table: its first blocks, or others after a preemption."""
        if export := self._exports.get(request_id):
            export.block_ids = list(block_ids)

    def extend(self, request_id: str, block_ids: Iterable[int]) -> None:
        """Append newly allocated blocks to a request's table."""
        if export := self._exports.get(request_id):
            export.block_ids.extend(block_ids)

    def plan(self, computed_after: Mapping[str, int], *, computes: bool) -> StepPlan:
        """Plan a step after which request ``r`` has ``computed_after[r]`` tokens in its blocks.

        Blocks of a prefix hit count as computed, so a first step starts at the ticket's ``reused_tokens`` all the same.
        """
        plan = StepPlan(aborted=self._aborted, idle=self._deferred and not computes)
        self._aborted, self._deferred = {}, False
        for request_id, computed in computed_after.items():
            export = self._exports.get(request_id)
            if export is not None and not export.ended and not export.failure:
                _plan_export(plan, export, min(computed, export.prompt_tokens))
        return plan

    def report(self, backlog_bytes: int, failed: Mapping[str, str]) -> None:
        """Take in what the workers said after a step. What has failed in one is given up in all."""
        self._backlog_bytes = backlog_bytes
        for ticket, reason in failed.items():
            if request_id := self._request_of.get(ticket):
                self._exports[request_id].failure = reason
                self._aborted[ticket] = reason

    def finish(self, request_id: str, *, prefilled: bool) -> dict[str, object] | None:
        """Forget a finished request; returns what its answer carries as ``kv_transfer_params``, if anything.

        ``prefilled`` is False for a request that was aborted or failed. ``complete`` says that every token was handed
        to the sender and no failure was known yet; only the decode worker knows what arrived.
        """
        if refusal := self._refused.pop(request_id, ""):
            return {PARAMS_KEY: {"error": refusal}}
        export = self._exports.pop(request_id, None)
        if export is None:
            return None
        ticket = export.ticket
        del self._request_of[ticket.ticket]
        if not export.ended and not export.failure:
            export.failure = "prefill was aborted" if not prefilled else "prefill ended before the prompt was exported"
            if not export.opened:
                log.info("request left before its export began", request_id=ticket.request_id)
            else:
                self._aborted[ticket.ticket] = export.failure
        result: dict[str, object] = {
            "exported_tokens": export.exported - ticket.reused_tokens,
            "complete": export.ended and not export.failure,
        }
        if export.failure:
            result["error"] = export.failure
        return {PARAMS_KEY: result}

    def _remember(self, ticket: str) -> None:
        self._remembered[ticket] = None
        if len(self._remembered) > MAX_REMEMBERED_TICKETS:
            self._remembered.popitem(last=False)


def _plan_export(plan: StepPlan, export: Export, end: int) -> None:
    ticket = export.ticket
    if not export.opened:
        plan.opened.append(ticket)
        export.opened = True
    if end > export.exported:
        interleave = ticket.landing.rope_order == "interleaved"
        block_ids = tuple(export.block_ids)
        plan.jobs.append(Job(ticket.ticket, export.exported, end, block_ids, ticket.chunk_tokens, interleave))
        export.exported = end
    if end == export.prompt_tokens:
        plan.ended[ticket.ticket] = end
        export.ended = True


def _read_ticket(value: object, prompt_tokens: int) -> Ticket:
    try:
        ticket = msgspec.convert(value, Ticket)
        ticket_key(ticket.ticket)
    except (msgspec.ValidationError, ProtocolError) as error:
        raise RequestError(f"kv_transfer_params.{PARAMS_KEY} is not a ticket: {error}", PARAMS_KEY) from None
    if ticket.chunk_tokens < 1:
        raise RequestError(f"chunk_tokens must be at least 1, not {ticket.chunk_tokens}", "chunk_tokens")
    if not 0 <= ticket.reused_tokens <= prompt_tokens:
        raise RequestError(
            f"reused_tokens must lie in 0..{prompt_tokens}, the prompt's length, not {ticket.reused_tokens}",
            "reused_tokens",
        )
    codecs.by_name(ticket.codec)
    return ticket
