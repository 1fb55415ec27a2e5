"""A real worker without room: requests wait in line, and come in when others end."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.cpu_decode.asking import PROMPT, gather
from tests.cpu_decode.serving import MAX_SEQUENCES, Running, serving
from tests.cpu_decode.test_worker import eventually, prompt_of, send_kv
from tests.cpu_decode.worker_client import WorkerClient
from transfer.errors import CapacityError, RequestError
from transfer.messages import Abort, Failure, Queued, Reserve, Sampling, Ticket

# Two thirds of the cells: two of these never fit.
LARGE = Sampling(max_tokens=200, temperature=0.0, ignore_eos=True)
SMALL = Sampling(max_tokens=3, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def running(model, geometry) -> Iterator[Running]:
    with serving(model, geometry, "bf16", num_cells=300, max_queued=2) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(running):
    yield
    eventually(lambda: running.client.status().used_cells == 0)
    assert running.client.status().queued_requests == 0
    assert all(running.context.cached_tokens(seq_id) == 0 for seq_id in range(MAX_SEQUENCES + 1))


def reserve(request_id: str, sampling: Sampling = LARGE, **more: object) -> Reserve:
    return Reserve(request_id=request_id, prompt=PROMPT, sampling=sampling, source="local", **more)


def about(client: WorkerClient, request_id: str):
    """The next word about a request."""
    return client._wait_for(lambda message: getattr(message, "request_id", None) == request_id)


def ask(running: Running, message: Reserve):
    running.client.send(message)
    return about(running.client, message.request_id)


def test_a_request_waits_for_room_and_says_how_long_it_did(running):
    first = ask(running, reserve("first"))
    running.client.start(first)
    gather_some(running, first, 20)
    queued = ask(running, reserve("second"))
    assert (queued.position, type(queued)) == (0, Queued)
    # What the first still has to say, in steps that take as long as the last ones.
    assert 0 < queued.wait_ms < 60_000
    assert running.client.status().queued_requests == 1
    assert running.client.status().used_cells == len(PROMPT) + LARGE.max_tokens
    gather(running, first, 1)
    second = about(running.client, "second")
    assert isinstance(second, Ticket)
    assert 0 < second.deadline_ms < 60_000
    running.client.start(second)
    _, report = gather(running, second, 1)
    assert report.worker_queue_ns > 0
    assert report.worker_queue_ns < queued.wait_ms * 20e6


def gather_some(running: Running, ticket: Ticket, count: int) -> None:
    while count > 0:
        count -= len(running.client.next_tokens(ticket).token_ids)


def test_nobody_overtakes_and_the_line_has_an_end(running):
    first = ask(running, reserve("a"))
    assert ask(running, reserve("b")).position == 0
    # There would be room for this one.
    assert ask(running, reserve("c", SMALL)).position == 1
    full = ask(running, reserve("d", SMALL))
    assert isinstance(full, Failure)
    assert (full.code, "max_queued" in full.message) == (CapacityError.code, True)
    assert ask(running, reserve("b")).code == RequestError.code
    running.client.abort(first)
    tickets = [about(running.client, request_id) for request_id in "bc"]
    assert all(isinstance(ticket, Ticket) for ticket in tickets)
    for ticket in tickets:
        running.client.abort(ticket)


def test_what_could_never_be_served_does_not_wait(running):
    first = ask(running, reserve("a"))
    assert ask(running, reserve("b")).position == 0
    for message in (
        reserve("c", Sampling(max_tokens=300)),
        reserve("d", Sampling(max_tokens=0)),
        reserve("e", SMALL, choices=MAX_SEQUENCES + 1),
    ):
        assert ask(running, message).code == RequestError.code
    running.client.send(Abort(request_id="b"))
    running.client.abort(first)


def test_whoever_leaves_the_line_makes_room_for_the_next(running):
    first = ask(running, reserve("a"))
    assert ask(running, reserve("b")).position == 0
    assert ask(running, reserve("c", SMALL)).position == 1
    running.client.send(Abort(request_id="b"))
    third = about(running.client, "c")
    assert isinstance(third, Ticket)
    for ticket in (first, third):
        running.client.abort(ticket)


def test_a_request_waits_no_longer_than_its_deadline(running):
    first = ask(running, reserve("a"))
    began = time.monotonic()
    assert ask(running, reserve("b", deadline_ms=300)).position == 0
    failure = about(running.client, "b")
    assert isinstance(failure, Failure)
    assert (failure.code, "no room on the decode worker" in failure.message) == (CapacityError.code, True)
    assert time.monotonic() - began >= 0.3
    running.client.abort(first)


def test_a_client_that_vanishes_leaves_the_line(running, monkeypatch):
    first = ask(running, reserve("a"))
    other = WorkerClient(running.worker.control_port, running.proxy_keys)
    other.send(reserve("b"))
    assert isinstance(about(other, "b"), Queued)
    other.close()
    monkeypatch.setattr("cpu_decode.clients.CLIENT_SILENCE_S", 0.5)

    def gone() -> bool:
        return running.client.status().queued_requests == 0

    eventually(gone)
    running.client.abort(first)


def test_cells_of_choices_that_have_ended_are_others(running):
    # Without ignore_eos and with a likely end, the choices end at different steps.
    uneven = Sampling(max_tokens=40, temperature=1.0, seed=3, logit_bias={2: 9.0})
    ticket = running.client.reserve(PROMPT, uneven, "local", choices=5)
    before = running.client.status()
    assert (before.used_cells, before.reserved_sequences) == (len(PROMPT) + 5 * 40, 5)
    running.client.start(ticket)
    seen = set()
    finished = []
    while True:
        message = running.client.next_tokens(ticket)
        if message.finish_reason:
            finished.append(message.choice)
        status = running.client.status()
        seen.add((status.reserved_sequences, status.used_cells))
        if message.report:
            break
    assert len(finished) == 5
    # The first one's cells hold the prompt for the others; those of each of the others come back when it ends.
    assert any(sequences < 5 and cells <= len(PROMPT) + sequences * 40 for sequences, cells in seen if sequences)


def test_landing_buffers_are_waited_for_like_cells(model, geometry):
    # One chunk of 64 tokens is 2.8 MB of bf16 cells: there is room for one.
    with serving(model, geometry, "bf16", landing_mib=4, max_queued=2) as tight:
        first = tight.client.reserve(prompt_of(40), SMALL, "kv")
        waits = Reserve(request_id="kv", prompt=prompt_of(40), sampling=SMALL, source="kv")
        assert isinstance(ask(tight, waits), Queued)
        tight.client.abort(first)
        second = about(tight.client, "kv")
        assert isinstance(second, Ticket)
        tight.client.abort(second)
        eventually(lambda: tight.client.status().used_cells == 0)


# Streams of 256 cells: 200 tokens gather beside two chunks, and no second prompt does.
@pytest.mark.parametrize("room", [{"landing_mib": 4}, {"cell_layout": "streams", "num_cells": 2560, "landing_mib": 12}])
def test_landing_memory_is_free_as_soon_as_the_kv_is_in_cells(model, geometry, context, room):
    prompt = prompt_of(200)
    with serving(model, geometry, "bf16", max_queued=2, **room) as tight:
        first = tight.client.reserve(prompt, SMALL, "kv")
        waits = Reserve(request_id="kv", prompt=prompt, sampling=SMALL, source="kv")
        assert isinstance(ask(tight, waits), Queued)
        # It does not even have to start.
        token = send_kv(tight, context, first, prompt)
        second = about(tight.client, "kv")
        assert isinstance(second, Ticket)
        assert tight.client.status().landing_bytes == 0
        tight.client.start(first, token)
        assert len(tight.client.collect(first)[0]) == SMALL.max_tokens
        tight.client.abort(second)
        eventually(lambda: tight.client.status().used_cells == 0)
