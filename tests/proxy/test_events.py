"""Server-sent events: entries as they are closed, nodes every second, and clients that are slow, late or too many."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from proxy import events
from tests.proxy.conftest import Stack, wait_until


class Told:
    """One client's stream, an event at a time."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.iter_lines()

    def next(self, name: str) -> dict[str, Any]:
        """The next event of that name; its data is JSON."""
        while True:
            event: dict[str, Any] = {}
            for line in self._lines:
                if not line:
                    break
                field, _, value = line.partition(": ")
                event[field] = value
            if event.get("event") == name:
                return event | {"data": json.loads(event["data"])}


@contextmanager
def listening(stack: Stack, **headers: str) -> Iterator[Told]:
    others = len(stack.gateway.events._inboxes)
    with (
        httpx.Client(base_url=stack.url, timeout=20, trust_env=False) as http,
        http.stream("GET", "/events", headers=headers) as response,
    ):
        assert response.status_code == 200
        yield Told(response)
    wait_until(lambda: len(stack.gateway.events._inboxes) <= others)


def test_entries_and_nodes_as_they_are(stack):
    with listening(stack) as told:
        assert told.response.headers["content-type"].startswith("text/event-stream")
        assert told.next("nodes")["data"]["prefill"]["up"]
        stack.chat({"X-Request-Id": "first"})
        event = told.next("entry")
        assert event["data"] == stack.entries()[-1] | {"regret_ns": event["data"]["regret_ns"]}
        assert event["id"] == str(event["data"]["seq"])
        assert told.next("nodes")["data"]["proxy"] == {"running": 0, "queued": 0}


def test_a_client_that_comes_back_is_told_what_it_missed_and_nothing_twice(stack):
    for number in range(4):
        stack.chat({"X-Request-Id": f"missed-{number}"})
    with listening(stack, **{"Last-Event-ID": "2"}) as told:
        assert [told.next("entry")["data"]["request_id"] for _ in range(2)] == ["missed-2", "missed-3"]
        stack.chat({"X-Request-Id": "live"})
        assert told.next("entry")["data"]["request_id"] == "live"
    with listening(stack, **{"Last-Event-ID": "nonsense"}) as told:
        stack.chat({"X-Request-Id": "later"})
        assert told.next("entry")["data"]["request_id"] == "later"


def test_what_is_found_out_later_is_told(stack):
    once = [{"role": "user", "content": "asked twice"}]
    stack.chat(messages=once)
    with listening(stack) as told:
        (entry,) = stack.entries()
        assert entry["reason"] != "forced"
        assert entry["regret_ns"] is None
        # The same by another route shows what the first one cost.
        stack.chat({"X-Isthmus-Route": "gpu"}, messages=once)
        found = told.next("found")
        assert "id" not in found
        assert found["data"].keys() == {"seq", "regret_ns"}
        assert found["data"] == {key: stack.entries()[0][key] for key in found["data"]}
        loop_of(stack).call_soon_threadsafe(stack.gateway._compared, 1, "raw", 0.25)
        assert told.next("found")["data"] == {"seq": 1, "parity_kl": 0.25}
        assert stack.entries()[0]["parity_kl"] == 0.25


def test_totals_are_told_at_once_and_when_they_have_changed(stack):
    with listening(stack) as told:
        assert told.next("totals")["data"] == {"seq": 0, "since": "", "ways": []}
        stack.chat({"X-Isthmus-Route": "gpu"})
        said = told.next("totals")["data"]
        assert said == stack.http.get("/totals").json()
        assert said["seq"] == 1
        assert [(way["route"], way["requests"]) for way in said["ways"]] == [("gpu", 1)]
        assert said["since"] == stack.entries()[0]["closed_at"]


def test_there_may_be_so_many_clients(stack, monkeypatch):
    monkeypatch.setattr(events, "MAX_CLIENTS", 3)
    with ExitStack() as clients:
        told = [clients.enter_context(listening(stack)) for _ in range(3)]
        for client in told:
            client.next("nodes")
        refused = stack.http.get("/events")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "capacity_exceeded"
        clients.pop_all().close()
    with listening(stack) as told:
        told.next("nodes")


def test_a_client_that_reads_nothing_is_dropped_and_holds_nobody_up(stack, monkeypatch):
    monkeypatch.setattr(events, "STALLED_S", 0.5)
    port = stack.gateway.cluster.proxy.port
    big = b'{"x": "' + b"x" * 100_000 + b'"}'
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", port))
        slow.sendall(b"GET /events HTTP/1.1\r\nHost: isthmus\r\n\r\n")
        wait_until(lambda: stack.gateway.events._inboxes)
        with listening(stack) as told:
            loop = loop_of(stack)
            for number in range(100):
                loop.call_soon_threadsafe(stack.gateway.events._tell, 0, events._event("big", big))
                assert told.next("big")["data"]["x"], number
            wait_until(lambda: len(stack.gateway.events._inboxes) == 1)


def loop_of(stack: Stack) -> asyncio.AbstractEventLoop:
    (inbox, *_) = stack.gateway.events._inboxes
    return inbox._news._loop


def test_a_client_that_is_late_is_given_up():
    async def scenario() -> None:
        inbox = events.Inbox()
        for number in range(events.MAX_WAITING):
            inbox.put(number, b"")
        assert inbox.open
        inbox.put(0, b"")
        assert not inbox.open
        assert len(await inbox.take()) == events.MAX_WAITING + 1
        assert await inbox.take() == []

    asyncio.run(scenario())


@pytest.mark.parametrize("already", [True, False])
def test_the_proxys_end_ends_every_stream(already):
    async def scenario() -> None:
        told = events.Events()
        if already:
            told.close()
        with told.inbox() as inbox:
            waiting = asyncio.create_task(inbox.take())
            await asyncio.sleep(0)
            told.close()
            assert await waiting == []

    asyncio.run(scenario())
