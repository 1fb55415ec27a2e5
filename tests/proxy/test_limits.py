"""Who runs, who waits and who is sent away: by real slots on a real event loop, without a clock."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.api_keys import ApiKey, Limits
from proxy.failures import RateLimitError, describe
from proxy.limits import Admission, OverloadError
from transfer.errors import RequestError


class Crowd:
    """Requests that run until they are told to end."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.started: list[str] = []
        self.served_tokens: dict[str, int] = defaultdict(int)
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def send(self, request_id: str, key: ApiKey, tokens: int = 1) -> None:
        self._ends[request_id] = asyncio.Event()
        self._tasks[request_id] = asyncio.create_task(self._serve(request_id, key, tokens))
        await settled()
        if self._tasks[request_id].done():
            await self._tasks.pop(request_id)

    async def end(self, request_id: str) -> None:
        self._ends[request_id].set()
        await self._tasks.pop(request_id)
        await settled()

    async def leave(self, request_id: str) -> None:
        task = self._tasks.pop(request_id)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await settled()

    @property
    def running(self) -> list[str]:
        return [request_id for request_id in self.started if request_id in self._tasks]

    async def _serve(self, request_id: str, key: ApiKey, tokens: int) -> None:
        # What is guessed is half of the truth, or double.
        guess = tokens // 2 if tokens % 2 else tokens * 2
        async with self.admission.slot(request_id, key, guess) as slot:
            self.started.append(request_id)
            await self._ends[request_id].wait()
            slot.settle(tokens)
            self.served_tokens[key.name] += tokens


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def crowd(test: Callable[[Crowd], Awaitable[None]], max_running: int, max_queued: int) -> None:
    async def run() -> None:
        found = Crowd(Admission(max_running, max_queued))
        await test(found)
        for request_id in list(found._tasks):
            await found.leave(request_id)
        assert found.admission.running == found.admission.queued == 0

    asyncio.run(run())


def key(name: str, **limits: float) -> ApiKey:
    return ApiKey(name=name, limits=Limits(**limits))


A, B = key("a"), key("b")


def test_who_comes_late_does_not_wait_behind_a_long_queue():
    async def test(found: Crowd) -> None:
        for number in range(10):
            await found.send(f"a{number}", A, 10)
        await found.send("b0", B, 10)
        await found.send("b1", B, 10)
        await found.end("a0")
        assert found.started[-1] == "b0"
        await found.end("b0")
        assert found.started[-1] == "a1"
        await found.end("a1")
        assert found.started[-1] == "b1"

    crowd(test, 1, 100)


def test_long_requests_cost_their_key_more():
    async def test(found: Crowd) -> None:
        for number in range(12):
            await found.send(f"a{number}", A, 50)
            await found.send(f"b{number}", B, 10)
        for _ in range(12):
            await found.end(found.running[0])
        assert found.served_tokens["a"] == 100
        assert found.served_tokens["b"] == 100

    crowd(test, 1, 100)


def test_nothing_is_saved_up_by_waiting():
    async def test(found: Crowd) -> None:
        for number in range(20):
            await found.send(f"a{number}", A, 10)
        for _ in range(10):
            await found.end(found.running[0])
        for number in range(10):
            await found.send(f"b{number}", B, 10)
        for _ in range(6):
            await found.end(found.running[0])
        # It gets its half from now on, not ten in a row.
        assert 2 <= sum(name.startswith("b") for name in found.started) <= 4

    crowd(test, 1, 100)


def test_a_keys_limit_leaves_slots_to_others():
    async def test(found: Crowd) -> None:
        limited = key("limited", max_running=2)
        for number in range(5):
            await found.send(f"l{number}", limited)
        await found.send("b", B)
        assert found.started == ["l0", "l1", "b"]
        await found.end("b")
        assert found.admission.running == 2
        await found.end("l0")
        assert found.running == ["l1", "l2"]

    crowd(test, 4, 100)


def test_a_queue_that_is_full_is_said_at_once():
    async def test(found: Crowd) -> None:
        await found.send("a0", A)
        for number in range(1, 6):
            await found.send(f"a{number}", A)
        # Half of ten may be one key's.
        with pytest.raises(RateLimitError, match="5 requests wait with this API key") as caught:
            await found.send("a6", A)
        assert describe(caught.value).status == 429
        assert int(describe(caught.value).headers["Retry-After"]) >= 1
        for number in range(5):
            await found.send(f"c{number}", key(f"c{number}"))
        with pytest.raises(OverloadError, match="10 wait") as overload:
            await found.send("b", B)
        assert describe(overload.value).status == 503
        assert int(describe(overload.value).headers["Retry-After"]) >= 1
        assert found.admission.queued == 10

    crowd(test, 1, 10)


def test_without_keys_everyone_may_fill_the_queue():
    async def test(found: Crowd) -> None:
        nobody = ApiKey(name="")
        for number in range(11):
            await found.send(f"n{number}", nobody)
        with pytest.raises(OverloadError):
            await found.send("n11", nobody)

    crowd(test, 1, 10)


def test_who_leaves_the_queue_leaves_nothing_behind():
    async def test(found: Crowd) -> None:
        await found.send("a0", A)
        await found.send("a1", A)
        await found.send("b0", B)
        await found.leave("a1")
        assert found.admission.queued == 1
        await found.end("a0")
        assert found.running == ["b0"]
        with pytest.raises(RequestError, match="'b0'"):
            async with found.admission.slot("b0", B):
                pass

    crowd(test, 1, 10)


def test_who_leaves_just_when_a_slot_is_given_passes_it_on():
    async def test(found: Crowd) -> None:
        for request_id in ("a0", "a1", "a2"):
            await found.send(request_id, A)
        found._ends["a0"].set()
        first, second = found._tasks.pop("a0"), found._tasks["a1"]
        await first
        # The slot is a1's, which does not know it yet.
        second.cancel()
        await settled()
        del found._tasks["a1"]
        assert found.running == ["a2"]
        assert (found.admission.running, found.admission.queued) == (1, 0)

    crowd(test, 1, 10)


KEYS = st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2, max_size=4).map(
    lambda weights: [key(str(number), weight=weight) for number, weight in enumerate(weights)]
)
COSTS = st.lists(st.integers(1, 60), min_size=4, max_size=4)
ENDS = st.lists(st.integers(0, 3), min_size=80, max_size=80)


def most_apart(keys: list[ApiKey], costs: list[int], max_running: int) -> float:
    """How far two keys' tokens, over their weights, may be apart: what all slots take, guessed too high by half."""
    return 2 * (max_running + 1) * max(costs) / min(each.limits.weight for each in keys)


@settings(deadline=None, max_examples=30)
@given(keys=KEYS, costs=COSTS, max_running=st.integers(1, 3), which=ENDS)
def test_keys_that_always_wait_get_tokens_by_their_weights(keys, costs, max_running, which):
    async def test(found: Crowd) -> None:
        # More than can be served here, so that all have some waiting to the end.
        for number in range(len(which) + 4):
            for each, cost in zip(keys, costs, strict=False):
                await found.send(f"{each.name}-{number}", each, cost)
        for choice in which:
            await found.end(found.running[choice % max_running])
            shares = [found.served_tokens[each.name] / each.limits.weight for each in keys]
            assert max(shares) - min(shares) <= most_apart(keys, costs, max_running)

    crowd(test, max_running, 10_000)


@settings(deadline=None, max_examples=30)
@given(keys=KEYS, costs=COSTS, max_running=st.integers(1, 3), which=ENDS)
def test_no_key_starves(keys, costs, max_running, which):
    """One request comes when others' queues are long: it runs before they have got much more."""

    async def test(found: Crowd) -> None:
        *others, late = keys
        for number in range(len(which)):
            for each, cost in zip(others, costs, strict=False):
                await found.send(f"{each.name}-{number}", each, cost)
        for choice in which[:20]:
            await found.end(found.running[choice % max_running])
        before = {each.name: found.served_tokens[each.name] for each in others}
        await found.send("late", late, 1)
        for choice in which[20:]:
            if "late" in found.started:
                break
            await found.end(found.running[choice % max_running])
        assert "late" in found.started
        for each in others:
            got = (found.served_tokens[each.name] - before[each.name]) / each.limits.weight
            assert got <= most_apart(keys, costs, max_running)

    crowd(test, max_running, 10_000)
