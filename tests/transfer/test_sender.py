import random
import threading
import time

import numpy as np
import pytest

from tests.transfer.faulty_link import FaultyLink
from tests.transfer.kv_plane import (
    CHUNK_TOKENS,
    FRAME_BYTES,
    GEOMETRY,
    PATIENCE_S,
    Worker,
    make_chunks,
    make_ticket,
    send,
)
from transfer.codecs import by_name
from transfer.errors import CodecError, IsthmusError, LinkError
from transfer.frames import Element
from transfer.layout import Slab
from transfer.sender import KVSender


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture
def sender():
    sender = KVSender(GEOMETRY, max_backlog_bytes=1 << 20, frame_bytes=FRAME_BYTES)
    yield sender
    sender.close()


def wait_for_failure(sender, ticket):
    """The reason why ``ticket`` failed, once it has."""
    give_up_ns = time.monotonic_ns() + int(PATIENCE_S * 1e9)
    while time.monotonic_ns() < give_up_ns:
        if reason := sender.take_failed().get(ticket.ticket):
            return reason
        time.sleep(0.01)
    raise AssertionError("the transfer neither failed nor ended")


def assert_landed(landed, chunks):
    assert landed.error is None
    assert landed.report is not None
    assert landed.rows.keys() == {tokens.start for tokens, _ in chunks}
    for tokens, elements in chunks:
        assert np.array_equal(landed.chunk(tokens.start), elements)


@pytest.mark.parametrize("codec", ["raw", "lz4", "zstd"])
@pytest.mark.parametrize("num_tokens", [1, CHUNK_TOKENS, 6 * CHUNK_TOKENS + 3])
def test_what_is_sent_lands(sender, worker, codec, num_tokens):
    ticket = make_ticket(worker.endpoint, codec=codec)
    landed, chunks = worker.expect(ticket), make_chunks(num_tokens)
    assert send(sender, ticket, chunks)
    assert worker.run_until(lambda: landed.over)
    assert_landed(landed, chunks)
    report = landed.report
    assert report.num_tokens == num_tokens
    assert report.kv_raw_bytes == sum(elements.nbytes for _, elements in chunks)
    assert report.num_frames == sum(2 if elements.nbytes > FRAME_BYTES else 1 for _, elements in chunks)
    assert report.gather_ns == len(chunks)
    assert report.encode_ns > 0
    assert worker.receiver.open_tickets == 0
    assert worker.run_until(lambda: sender.backlog_bytes == 0)
    assert sender.take_failed() == {}


def test_q8_takes_about_half_the_bytes(sender, worker):
    ticket = make_ticket(worker.endpoint, codec="q8")
    landed = worker.expect(ticket)
    send(sender, ticket, make_chunks(16))
    assert worker.run_until(lambda: landed.over)
    assert landed.report.kv_wire_bytes < 0.6 * landed.report.kv_raw_bytes


def test_several_transfers_share_a_link(sender, worker):
    tickets = [make_ticket(worker.endpoint) for _ in range(5)]
    landed = [worker.expect(ticket) for ticket in tickets]
    chunks = [make_chunks(20 + seed, seed) for seed in range(5)]
    for ticket, prompt in zip(tickets, chunks, strict=True):
        send(sender, ticket, prompt)
    assert worker.run_until(lambda: all(one.over for one in landed))
    for one, prompt in zip(landed, chunks, strict=True):
        assert_landed(one, prompt)


def test_no_more_chunks_are_sent_than_were_granted(sender, worker):
    ticket = make_ticket(worker.endpoint, credit_chunks=2)
    landed, chunks = worker.expect(ticket, grants=False), make_chunks(5 * CHUNK_TOKENS)
    send(sender, ticket, chunks)
    assert worker.run_until(lambda: landed.complete_chunks == 2)
    assert not worker.run_until(lambda: landed.complete_chunks > 2, patience_s=0.3)
    worker.receiver.grant(ticket.ticket, 4)
    assert worker.run_until(lambda: landed.complete_chunks == 4)
    worker.receiver.grant(ticket.ticket, 3)  # a credit that comes late takes nothing back
    worker.receiver.grant(ticket.ticket, 5)
    assert worker.run_until(lambda: landed.over)
    assert_landed(landed, chunks)


def test_a_stalled_transfer_does_not_hold_up_another(sender, worker):
    stalled, other = make_ticket(worker.endpoint, deadline_ms=5_000), make_ticket(worker.endpoint)
    worker.expect(stalled, grants=False)
    landed, chunks = worker.expect(other), make_chunks(30)
    send(sender, stalled, make_chunks(30))
    send(sender, other, chunks)
    assert worker.run_until(lambda: landed.over)
    assert_landed(landed, chunks)


def test_a_backlog_that_is_full_fails_its_own_transfer_only(worker):
    chunks = make_chunks(3 * CHUNK_TOKENS)
    sender = KVSender(GEOMETRY, max_backlog_bytes=chunks[0][1].nbytes * 2, frame_bytes=FRAME_BYTES)
    try:
        silent = make_ticket("tcp://127.0.0.1:9")
        assert not send(sender, silent, chunks)
        assert "backlog" in wait_for_failure(sender, silent)
        assert sender.backlog_bytes == 0
        ticket = make_ticket(worker.endpoint)
        landed = worker.expect(ticket)
        assert send(sender, ticket, chunks[:2])
        assert worker.run_until(lambda: landed.over)
        assert_landed(landed, chunks[:2])
    finally:
        sender.close()


def test_a_worker_that_never_answers_fails_by_the_deadline(sender):
    ticket = make_ticket("tcp://127.0.0.1:9", deadline_ms=100)
    send(sender, ticket, make_chunks(8))
    assert wait_for_failure(sender, ticket)
    assert sender.backlog_bytes == 0
    assert not sender.submit(ticket.ticket, range(8, 16), 0, make_chunks(8)[0][1], Element.BF16, 0)


@pytest.mark.parametrize("endpoint", ["", "not an endpoint", "tcp://127.0.0.1:notaport"])
def test_an_endpoint_that_makes_no_sense_fails_its_transfer(sender, endpoint):
    ticket = make_ticket(endpoint)
    send(sender, ticket, make_chunks(8))
    assert wait_for_failure(sender, ticket)


@pytest.mark.parametrize("ticket_id", ["", "zz" * 16, "00" * 15, "00" * 17])
def test_a_ticket_that_is_not_32_hex_digits_is_refused(sender, worker, ticket_id):
    ticket = make_ticket(worker.endpoint)
    with pytest.raises(IsthmusError, match="ticket"):
        sender.open(type(ticket)(**{**{f: getattr(ticket, f) for f in ticket.__struct_fields__}, "ticket": ticket_id}))


def test_a_reused_ticket_and_an_unknown_codec_are_refused(sender, worker):
    ticket = make_ticket(worker.endpoint)
    sender.open(ticket)
    with pytest.raises(LinkError, match="already in use"):
        sender.open(ticket)
    with pytest.raises(CodecError, match="snappy"):
        sender.open(make_ticket(worker.endpoint, codec="snappy"))


def test_values_that_the_codec_refuses_fail_on_both_sides(sender, worker):
    ticket, chunks = make_ticket(worker.endpoint), make_chunks(2 * CHUNK_TOKENS)
    landed = worker.expect(ticket)
    chunks[1][1][1, 5] = 0x7FC0
    send(sender, ticket, chunks)
    assert worker.run_until(lambda: landed.over)
    assert "infinity" in str(landed.error)
    assert "infinity" in wait_for_failure(sender, ticket)
    assert worker.receiver.open_tickets == 0


def test_elements_that_no_codec_takes_fail_their_own_transfer_only(sender, worker):
    broken, ticket, chunks = make_ticket(worker.endpoint, codec="lz4"), make_ticket(worker.endpoint), make_chunks(8)
    worker.expect(broken)
    landed = worker.expect(ticket)
    send(sender, broken, [(tokens, elements.astype(np.float64)) for tokens, elements in chunks])
    send(sender, ticket, chunks)
    assert worker.run_until(lambda: landed.over)
    assert_landed(landed, chunks)
    assert "internal error" in wait_for_failure(sender, broken)


def test_abort_reaches_the_worker(sender, worker):
    ticket = make_ticket(worker.endpoint)
    landed = worker.expect(ticket, grants=False)
    send(sender, ticket, make_chunks(5 * CHUNK_TOKENS))
    assert worker.run_until(lambda: landed.complete_chunks == 2)
    sender.abort(ticket.ticket, "the client left")
    assert worker.run_until(lambda: landed.over)
    assert "the client left" in str(landed.error)
    assert wait_for_failure(sender, ticket) == "the client left"
    assert sender.backlog_bytes == 0


def test_cancel_reaches_the_sender(sender, worker):
    ticket = make_ticket(worker.endpoint)
    landed = worker.expect(ticket, grants=False)
    send(sender, ticket, make_chunks(5 * CHUNK_TOKENS))
    assert worker.run_until(lambda: landed.complete_chunks == 2)
    worker.receiver.cancel(ticket.ticket, "evicted")
    assert "evicted" in wait_for_failure(sender, ticket)
    assert sender.backlog_bytes == 0


def test_another_model_is_refused_by_the_name_of_the_field(sender):
    other = Worker(geometry=type(GEOMETRY)(**{**geometry_fields(), "num_layers": 4}))
    try:
        ticket = make_ticket(other.endpoint)
        other.expect(ticket)
        send(sender, ticket, make_chunks(8))
        reasons = []
        threading.Thread(target=lambda: reasons.append(wait_for_failure(sender, ticket))).start()
        assert other.run_until(lambda: reasons)
        assert "num_layers: 4 here, 3 there" in reasons[0]
    finally:
        other.close()


def geometry_fields():
    return {field: getattr(GEOMETRY, field) for field in GEOMETRY.__struct_fields__}


def test_a_worker_that_was_restarted_is_found_again(sender):
    chunks = make_chunks(20)
    ports = 0, 0
    for _ in range(2):
        worker = Worker(ports)
        ports = worker.ports
        try:
            ticket = make_ticket(worker.endpoint)
            landed = worker.expect(ticket)
            send(sender, ticket, chunks)
            assert worker.run_until(lambda landed=landed: landed.over)
            assert_landed(landed, chunks)
        finally:
            worker.close()


def test_a_worker_that_vanishes_between_two_layers_fails_that_transfer_only(sender, worker):
    lost, other, chunks = Worker(), make_ticket(worker.endpoint), make_chunks(CHUNK_TOKENS)
    ticket = make_ticket(lost.endpoint, deadline_ms=1_500)
    ((tokens, elements),) = chunks
    landed = lost.expect(ticket)
    sender.open(ticket)
    sender.submit(ticket.ticket, tokens, 0, elements[:2].copy(), Element.BF16, 1)
    assert lost.run_until(lambda: len(landed.rows[0]) == 2)
    lost.close()
    sender.submit(ticket.ticket, tokens, 2, elements[2:].copy(), Element.BF16, 1)
    sender.finish(ticket.ticket, tokens.stop)
    well = worker.expect(other)
    assert send(sender, other, chunks)
    assert worker.run_until(lambda: well.over)
    assert_landed(well, chunks)
    assert wait_for_failure(sender, ticket)
    assert worker.run_until(lambda: sender.backlog_bytes == 0)


def test_close_with_transfers_under_way_returns():
    sender = KVSender(GEOMETRY, max_backlog_bytes=1 << 20, frame_bytes=FRAME_BYTES)
    send(sender, make_ticket("tcp://127.0.0.1:9"), make_chunks(20))
    sender.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "isthmus-sender"]


def test_close_tells_the_worker_of_prompts_that_were_computed_and_of_no_others(worker):
    sender = KVSender(GEOMETRY, max_backlog_bytes=1 << 20, frame_bytes=FRAME_BYTES)
    try:
        computed, begun = make_ticket(worker.endpoint), make_ticket(worker.endpoint)
        landed, landing = (worker.expect(ticket, grants=False) for ticket in (computed, begun))
        send(sender, computed, make_chunks(5 * CHUNK_TOKENS))
        sender.open(begun)
        ((tokens, elements),) = make_chunks(CHUNK_TOKENS)
        sender.submit(begun.ticket, tokens, 0, elements, Element.BF16, 1)
        assert worker.run_until(lambda: (landed.complete_chunks, landing.complete_chunks) == (2, 1))
    finally:
        sender.close()
    assert worker.run_until(lambda: landed.over)
    assert isinstance(landed.error, LinkError)
    assert "aborted the transfer: the prefill node ended" in str(landed.error)
    assert not worker.run_until(lambda: landing.over, patience_s=0.1)
    assert worker.receiver.open_tickets == 1


@pytest.fixture
def faulty(worker):
    """Makes links to the worker that are not to be trusted."""
    links = []

    def make(**options):
        links.append(FaultyLink(worker, **options))
        return links[-1]

    yield make
    for link in links:
        link.close()


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("step_chunks", [1, 2, 5])
def test_layers_may_be_sent_before_later_ones_are_there(sender, worker, layers, step_chunks):
    ticket, chunks = make_ticket(worker.endpoint), make_chunks(5 * CHUNK_TOKENS - 1)
    landed = worker.expect(ticket)
    assert send(sender, ticket, chunks, layers=layers, step_chunks=step_chunks)
    assert worker.run_until(lambda: landed.over)
    assert_landed(landed, chunks)


def test_frames_leave_before_the_last_layer_is_submitted(sender, worker):
    ticket, ((tokens, elements),) = make_ticket(worker.endpoint), make_chunks(CHUNK_TOKENS)
    landed = worker.expect(ticket)
    sender.open(ticket)
    sender.submit(ticket.ticket, tokens, 0, elements[:2], Element.BF16, 1)
    assert worker.run_until(lambda: len(landed.rows[0]) == 2)
    sender.submit(ticket.ticket, tokens, 2, elements[2:], Element.BF16, 1)
    sender.finish(ticket.ticket, CHUNK_TOKENS)
    assert worker.run_until(lambda: landed.over)
    assert_landed(landed, [(tokens, elements)])


@pytest.mark.parametrize("action", ["drop", "duplicate", "swap", "flip", "truncate", "delay"])
def test_what_a_link_does_to_frames_is_repaired(sender, worker, faulty, action):
    link = faulty(faults=0.2, actions=(action,), seed=1)
    for seed in range(3):
        ticket, chunks = make_ticket(link.endpoint), make_chunks(6 * CHUNK_TOKENS, seed)
        landed = worker.expect(ticket)
        send(sender, ticket, chunks)
        assert worker.run_until(lambda landed=landed: landed.over)
        assert_landed(landed, chunks)
    assert worker.run_until(lambda: sender.backlog_bytes == 0)
    assert link.done[action] > 0


def test_a_transfer_goes_on_where_it_was_when_the_link_comes_back(sender, worker, faulty):
    link = faulty()
    ticket, chunks = make_ticket(link.endpoint), make_chunks(8 * CHUNK_TOKENS)
    landed = worker.expect(ticket)
    sender.open(ticket)
    for tokens, elements in chunks[:4]:
        sender.submit(ticket.ticket, tokens, 0, elements, Element.BF16, 1)
    assert worker.run_until(lambda: landed.rows)
    link.cut.set()
    for tokens, elements in chunks[4:]:
        sender.submit(ticket.ticket, tokens, 0, elements, Element.BF16, 1)
    sender.finish(ticket.ticket, chunks[-1][0].stop)
    worker.run_until(lambda: False, patience_s=1.0)
    assert not landed.over
    link.cut.clear()
    assert worker.run_until(lambda: landed.over)
    assert_landed(landed, chunks)


def test_a_link_that_stays_cut_fails_its_transfer_at_the_deadline(sender, worker, faulty):
    link = faulty()
    link.cut.set()
    ticket = make_ticket(link.endpoint, deadline_ms=300)
    worker.expect(ticket)
    send(sender, ticket, make_chunks(8))
    assert "300 ms" in wait_for_failure(sender, ticket)
    assert sender.backlog_bytes == 0


def test_200_random_transfers_over_a_bad_link_land_whole_or_fail_and_leave_nothing(worker, faulty):
    rng = random.Random(7)
    link = faulty(faults=0.05, seed=7)
    sender = KVSender(GEOMETRY, max_backlog_bytes=1 << 26, frame_bytes=FRAME_BYTES)
    outcomes, failed = [], {}
    try:
        for _ in range(10):
            batch = []
            for _ in range(20):
                codec = rng.choice(["raw", "lz4", "zstd"])
                ticket = make_ticket(link.endpoint, codec=codec, deadline_ms=rng.choice([300, 3_000, 10_000]))
                chunks = make_chunks(rng.randrange(1, 6 * CHUNK_TOKENS), rng.randrange(1 << 30))
                batch.append((ticket, chunks, worker.expect(ticket)))
                send(sender, ticket, chunks, layers=rng.randrange(1, 4), step_chunks=rng.randrange(1, 4))
                if rng.random() < 0.1:
                    sender.abort(ticket.ticket, "the client left")

            def over(batch=batch):
                failed.update(sender.take_failed())
                return all(landed.over or ticket.ticket in failed for ticket, _, landed in batch)

            if rng.random() < 0.3:
                link.cut.set()
                worker.run_until(lambda: False, patience_s=0.3)
                link.cut.clear()
            assert worker.run_until(over)
            for ticket, chunks, landed in batch:
                outcomes.append(landed.report is not None)
                if landed.report is not None:
                    assert_landed(landed, chunks)
                # A decode worker's own deadline does this where the sender's ABORT is lost.
                worker.receiver.cancel(ticket.ticket, "failed at the sender")
        assert worker.run_until(lambda: sender.backlog_bytes == 0)
        assert worker.receiver.open_tickets == 0
        assert sum(outcomes) > 100
        assert all(link.done[action] for action in link.actions)
    finally:
        sender.close()


def test_payloads_that_came_encoded_land_as_the_sender_would_have_sent_them(sender, worker):
    ticket, ((tokens, elements),) = make_ticket(worker.endpoint, codec="q8"), make_chunks(CHUNK_TOKENS)
    landed = worker.expect(ticket)
    sender.open(ticket)
    for layers in (slice(0, 2), slice(2, 3)):
        slab = Slab(GEOMETRY, layers.stop - layers.start, tokens)
        payload = by_name("q8").encode(elements[layers].reshape(-1), Element.BF16, slab)
        rows = np.frombuffer(payload, np.uint16).reshape(slab.num_layers, -1)
        assert sender.submit(ticket.ticket, tokens, layers.start, rows, Element.BF16, 5, d2h_ns=7, encoded=True)
    sender.finish(ticket.ticket, tokens.stop)
    assert worker.run_until(lambda: landed.over)
    values, found = ((each.astype(np.uint32) << 16).view(np.float32) for each in (elements, landed.chunk(0)))
    assert np.abs(values - found).max() < 0.02
    assert landed.report.kv_raw_bytes == elements.nbytes
    assert (landed.report.gather_ns, landed.report.d2h_ns) == (10, 14)


def test_a_payload_longer_than_the_workers_frames_fails_its_transfer_by_name(worker):
    sender = KVSender(GEOMETRY, max_backlog_bytes=1 << 20, frame_bytes=1 << 20)
    try:
        ticket, ((tokens, elements),) = make_ticket(worker.endpoint), make_chunks(CHUNK_TOKENS)
        worker.expect(ticket)
        sender.open(ticket)
        sender.submit(ticket.ticket, tokens, 0, elements, Element.BF16, 1, encoded=True)
        failed = {}
        assert worker.run_until(lambda: failed.update(sender.take_failed()) or failed)
        assert "set [link] frame_mib alike" in failed[ticket.ticket]
    finally:
        sender.close()
