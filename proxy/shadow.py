"""Requests that are run once more, by another route, when nothing else is to do: the truth about the alternative.

A shadow has the same prompt and makes as many tokens as the answer had. It finds nothing in any prefix cache and leaves
nothing there for others, its text goes nowhere, and the next real request ends it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from hashlib import blake2b
from typing import NamedTuple

import msgspec
import structlog

from proxy.dispatch import Dispatcher
from proxy.handoff import Job, NodeFailedError
from proxy.ledger import Account
from proxy.policy import alternatives
from proxy.regret import MAX_CACHED_SHARE
from proxy.router import Route
from transfer.errors import IsthmusError

# Nothing may have happened for so long before a shadow begins.
QUIET_S = 0.5
POLL_S = 0.1
MAX_S = 600.0

log = structlog.get_logger()


class _Case(NamedTuple):
    job: Job
    account: Account
    route: Route


class Shadows:
    """Runs a ``share`` of requests again, one at a time, while ``idle``; ``closed`` enters what came of each.

    :meth:`run` does the work; :meth:`interrupt` says that a real request has come.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        share: float,
        *,
        idle: Callable[[], bool],
        closed: Callable[[Account, str], object],
    ) -> None:
        self._dispatcher = dispatcher
        self._share = share
        self._is_idle = idle
        self._closed = closed
        self._waiting: _Case | None = None
        self._task: asyncio.Task[None] | None = None
        self._busy_ns = 0

    @property
    def running(self) -> bool:
        """Whether one runs now."""
        return self._task is not None

    def offer(self, job: Job, account: Account) -> None:
        """A request has been answered: keep it if it is one of the share, in the place of one that still waits."""
        self._busy_ns = time.monotonic_ns()
        if not _is_sampled(job.request_id, self._share) or job.planned is None or job.forced or account.attempts:
            return
        if account.cached_tokens > MAX_CACHED_SHARE * account.prompt_tokens or not account.completion_tokens:
            return
        others = alternatives(job.planned.decision)
        if others:
            self._waiting = _Case(job, account, others[account.prompt_tokens % len(others)])

    def interrupt(self) -> None:
        """A real request has come: what runs ends."""
        self._busy_ns = time.monotonic_ns()
        if self._task is not None:
            self._task.cancel()

    async def run(self) -> None:
        """Run shadows until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            quiet = time.monotonic_ns() - self._busy_ns > QUIET_S * 1e9
            if self._waiting is None or not quiet or not self._is_idle():
                continue
            case, self._waiting = self._waiting, None
            self._task = asyncio.create_task(self._shadow(case))
            try:
                await asyncio.wait([self._task])
            finally:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)
                self._task = None

    async def _shadow(self, case: _Case) -> None:
        account = Account(f"{case.job.request_id}-shadow", case.account.model)
        status = "cancelled"
        try:
            async with asyncio.timeout(MAX_S):
                await self._serve(case, account)
            status = "ok"
        except (IsthmusError, NodeFailedError, TimeoutError) as error:
            status = getattr(error, "code", "failed")
            log.warning("a shadow failed", request_id=account.request_id, error=str(error))
        except Exception:
            status = "internal_error"
            log.exception("a shadow failed unexpectedly", request_id=account.request_id)
        finally:
            account.reason = "shadow"
            account.shadow_of = case.job.request_id
            with suppress(Exception):
                self._closed(account, status)

    async def _serve(self, case: _Case, account: Account) -> None:
        job = self._dispatcher.plan(_shadowed(case, self._dispatcher.deadline_ns()), account)
        # What was expected when the choice was made is what is put to the test.
        account.predicted = case.account.predicted
        async with aclosing(self._dispatcher.served(job, account)) as pieces:
            async for piece in pieces:
                if piece.text:
                    account.saw_text()


def _shadowed(case: _Case, deadline_ns: int) -> Job:
    job, tokens = case.job, case.account.completion_tokens // case.job.choices
    sampling = msgspec.structs.replace(
        job.sampling, max_tokens=tokens, min_tokens=0, ignore_eos=True, stop=(), stop_token_ids=(), logprobs=None
    )
    return job._replace(
        request_id=f"{job.request_id}-shadow",
        sampling=sampling,
        codec=None,
        deadline_ns=deadline_ns,
        forced=case.route,
        tenant=f"shadow of {job.request_id}",
        reuse=False,
        limit=tokens,
        planned=None,
    )


def _is_sampled(request_id: str, share: float) -> bool:
    """The same requests every time: whether a number made of the id is under the share."""
    return int.from_bytes(blake2b(request_id.encode(), digest_size=8).digest()) < share * 2**64
