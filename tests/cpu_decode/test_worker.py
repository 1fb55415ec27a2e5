"""A real worker, a real sender, real sockets: llama.cpp's own KV goes over the wire and comes back as tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from cpu_decode.reservations import even_chunk_tokens
from tests.cpu_decode.asking import gather
from tests.cpu_decode.native_kv import elements_of, prefill
from tests.cpu_decode.serving import LAYOUTS, MAX_SEQUENCES, Running, serving
from tests.cpu_decode.worker_client import WorkerClient
from transfer.errors import CapacityError, CodecError, LinkError, RequestError
from transfer.frames import Element
from transfer.layout import Elements
from transfer.messages import PROTOCOL, Failure, Hello, Sampling, Start, Ticket, Welcome

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [(11 * i + 5 + 131 * salt) % 40_000 for i in range(length)]


def prefilled(running, context, prompt: list[int]) -> tuple[int, Elements]:
    """The first token that prefill elsewhere would sample, and the KV."""
    first = int(prefill(context, 0, prompt).argmax())
    elements = elements_of(context.state(0), running.geometry, len(prompt))
    context.trim(0, 0)
    return first, elements


def send_kv(running, context, ticket: Ticket, prompt: list[int], upto: int | None = None) -> int:
    """Prefill elsewhere, send the KV on ``ticket``; returns the first token that prefill would sample."""
    first, elements = prefilled(running, context, prompt)
    send(running, ticket, elements, len(prompt), upto)
    return first


def send(running, ticket: Ticket, elements: Elements, num_tokens: int, upto: int | None = None) -> None:
    """Send the KV of ``num_tokens`` tokens; with ``upto`` only that of the first ones, and no end."""
    heads, dims = running.geometry.num_kv_heads, (running.geometry.head_dim_k, running.geometry.head_dim_v)
    k_row, v_row = (heads * dim for dim in dims)
    split = num_tokens * k_row
    running.sender.open(ticket)
    for start in range(0, num_tokens if upto is None else upto, ticket.chunk_tokens):
        end = min(start + ticket.chunk_tokens, num_tokens)
        k, v = slice(start * k_row, end * k_row), slice(split + start * v_row, split + end * v_row)
        part = np.ascontiguousarray(np.concatenate([elements[:, k], elements[:, v]], axis=1))
        assert running.sender.submit(ticket.ticket, range(start, end), 0, part, Element.BF16, 0)
    if upto is None:
        running.sender.finish(ticket.ticket, num_tokens)


def eventually(check, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


@pytest.fixture(scope="module", params=LAYOUTS)
def running(request, model, geometry) -> Iterator[Running]:
    with serving(model, geometry, "bf16", **LAYOUTS[request.param]) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_leaks(running):
    yield

    def idle() -> bool:
        status = running.client.status()
        return not (status.used_cells or status.reserved_sequences or status.running_sequences or status.landing_bytes)

    eventually(idle)
    assert running.empty
    assert running.sender.backlog_bytes == 0


def locally(running, prompt: list[int], sampling: Sampling = GREEDY) -> tuple[list[int], str]:
    ticket = running.client.reserve(prompt, sampling, "local")
    running.client.start(ticket)
    ids, text, _ = running.client.collect(ticket)
    return ids, text


@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
def test_transplanted_kv_continues_like_a_local_prefill(running, context, length):
    prompt = prompt_of(length)
    expected, text = locally(running, prompt)
    ticket = running.client.reserve(prompt, GREEDY, "kv")
    first = send_kv(running, context, ticket, prompt)
    running.client.start(ticket, first)
    ids, got, last = running.client.collect(ticket)
    assert (ids, got) == (expected, text)
    assert last.finish_reason == "length"
    assert last.report.kv_raw_bytes == 2 * length * running.geometry.elements_per_token
    assert last.report.completion_tokens == GREEDY.max_tokens


def test_start_before_the_kv_waits_for_it(running, context):
    prompt = prompt_of(150)
    expected, _ = locally(running, prompt)
    ticket = running.client.reserve(prompt, GREEDY, "kv")
    running.client.start(ticket)
    time.sleep(0.1)
    assert running.client.status().running_sequences == 0
    send_kv(running, context, ticket, prompt)
    ids, _, last = running.client.collect(ticket)
    assert ids == expected
    assert last.report.transfer_exposed_ns > 50_000_000


def test_a_report_says_what_was_left_behind_the_last_frame(running, context):
    prompt = prompt_of(200)
    ticket = running.client.reserve(prompt, GREEDY, "kv")
    running.client.start(ticket)
    time.sleep(0.3)
    send_kv(running, context, ticket, prompt)
    waited = running.client.collect(ticket)[2].report
    assert 0 < waited.landing_tail_ns < waited.transfer_exposed_ns - 300_000_000
    ticket = running.client.reserve(prompt_of(200, salt=1), GREEDY, "kv")
    first = send_kv(running, context, ticket, prompt_of(200, salt=1))
    eventually(lambda: running.sender.backlog_bytes == 0)
    running.client.start(ticket, first)
    late = running.client.collect(ticket)[2].report
    assert 0 < late.landing_tail_ns == late.transfer_exposed_ns


def test_the_first_tokens_text_is_not_sent_twice(running, context):
    prompt = prompt_of(80)
    ids, text = locally(running, prompt)
    ticket = running.client.reserve(prompt, GREEDY, "kv")
    first = send_kv(running, context, ticket, prompt)
    running.client.start(ticket, first, first_text_sent=True)
    got_ids, got, _ = running.client.collect(ticket)
    assert got_ids == ids
    assert running.model.piece(first).decode() + got == text


def test_many_at_once_answer_as_one_by_one(running, context):
    prompts = [prompt_of(20 + 37 * n, salt=n) for n in range(MAX_SEQUENCES)]
    known = [(prompt, *prefilled(running, context, prompt)) for prompt in prompts]
    # The first must not end before the last is done: what it leaves free would be taken in another order.
    longer = msgspec.structs.replace(GREEDY, max_tokens=8 * GREEDY.max_tokens)

    def reserve_and_send(
        prompt: list[int], first: int, elements: Elements, sampling: Sampling = GREEDY
    ) -> tuple[Ticket, int]:
        ticket = running.client.reserve(prompt, sampling, "kv")
        send(running, ticket, elements, len(prompt))
        return ticket, first

    alone = []
    for each in known:
        ticket, first = reserve_and_send(*each)
        running.client.start(ticket, first)
        alone.append(running.client.collect(ticket)[0])
    together = [reserve_and_send(*each, longer) for each in known]
    for ticket, first in together:
        running.client.start(ticket, first)
    answers = [running.client.collect(ticket)[0] for ticket, _ in together]
    assert [answer[: GREEDY.max_tokens] for answer in answers] == alone


def test_a_steps_tokens_come_in_one_message(running):
    for salt in (0, 1):
        running.client.start(running.client.reserve(prompt_of(20, salt), GREEDY, "local"))
    sizes, ended = [], 0
    while ended < 2:
        messages = running.client.listen_to_all()
        sizes.append(len(messages))
        ended += sum(message.finish_reason is not None for message in messages)
    assert max(sizes) == 2


def test_local_prefills_share_the_batch_with_running_sequences(running):
    # Not compared word for word: llama.cpp rounds a prompt's KV differently in batches of other sizes.
    tickets = [running.client.reserve(prompt_of(50 + 90 * n, salt=n), GREEDY, "local") for n in range(4)]
    for ticket in tickets:
        running.client.start(ticket)
    answers = [running.client.collect(ticket) for ticket in tickets]
    assert [len(ids) for ids, _, _ in answers] == [GREEDY.max_tokens] * 4
    assert len({tuple(ids) for ids, _, _ in answers}) == 4


def test_a_seed_repeats_itself_and_differs_from_another(running):
    def draw(seed: int) -> list[int]:
        return locally(running, prompt_of(40), Sampling(max_tokens=16, temperature=1.5, seed=seed, ignore_eos=True))[0]

    assert draw(1) == draw(1) != draw(2)


def test_logit_bias_forces_and_forbids(running):
    forced = Sampling(max_tokens=3, temperature=0.0, logit_bias={905: 100.0}, ignore_eos=True)
    assert locally(running, prompt_of(20), forced) == ([905] * 3, " world" * 3)


def test_penalties_add_up_until_another_token_wins(running):
    bias = {905: 100.0, 19556: 88.0}
    plain = Sampling(max_tokens=24, temperature=0.0, logit_bias=bias, ignore_eos=True)
    frequency = msgspec.structs.replace(plain, frequency_penalty=2.0)
    repetition = msgspec.structs.replace(plain, repetition_penalty=2.0)
    assert locally(running, prompt_of(20), plain)[0] == [905] * 24
    assert set(locally(running, prompt_of(20), frequency)[0]) == {905, 19556}
    assert locally(running, prompt_of(20), repetition)[0][:2] == [905, 19556]
    # The prompt counts for the repetition penalty, and only for it.
    assert locally(running, [905], repetition)[0][0] == 19556
    assert locally(running, [905], frequency)[0][0] == 905


def test_top_k_one_is_greedy_whatever_the_temperature(running):
    prompt = prompt_of(30)
    hot = Sampling(max_tokens=12, temperature=2.0, top_k=1, seed=3, ignore_eos=True)
    assert locally(running, prompt, hot)[0] == locally(running, prompt)[0]


def test_a_stop_string_ends_the_sequence(running):
    forced = Sampling(max_tokens=9, temperature=0.0, logit_bias={905: 100.0}, stop=("d wor",), ignore_eos=True)
    assert locally(running, prompt_of(20), forced) == ([905, 905], " worl")


def test_abort_at_every_stage_frees_everything(running, context):
    long = Sampling(max_tokens=900, temperature=0.0, ignore_eos=True)
    reserved = running.client.reserve(prompt_of(40), GREEDY, "kv")
    half_sent = running.client.reserve(prompt_of(200), GREEDY, "kv")
    send_kv(running, context, half_sent, prompt_of(200), upto=100)
    decoding = running.client.reserve(prompt_of(30), long, "local")
    running.client.start(decoding)
    eventually(lambda: running.client.status().running_sequences == 1)
    for ticket in (reserved, half_sent, decoding):
        running.client.abort(ticket)
    eventually(lambda: half_sent.ticket in running.sender.take_failed())


def test_a_client_that_vanishes_takes_its_requests_along(running):
    other = WorkerClient(running.worker.control_port, running.proxy_keys)
    ticket = other.reserve(prompt_of(20), Sampling(max_tokens=1000, temperature=0.0, ignore_eos=True), "local")
    other.start(ticket)
    eventually(lambda: running.client.status().running_sequences == 1)
    other.close()
    eventually(lambda: running.client.status().running_sequences == 0)


def test_a_transfer_that_ends_early_fails_the_request(running, context):
    prompt = prompt_of(100)
    ticket = running.client.reserve(prompt, GREEDY, "kv")
    send_kv(running, context, ticket, prompt, upto=64)
    running.sender.finish(ticket.ticket, 100)
    running.client.start(ticket, 5)
    with pytest.raises(Exception, match="64 of 100 tokens landed"):
        running.client.collect(ticket)


def test_a_sender_that_gives_up_fails_the_request(running, context):
    prompt = prompt_of(100)
    ticket = running.client.reserve(prompt, GREEDY, "kv")
    send_kv(running, context, ticket, prompt, upto=64)
    running.sender.abort(ticket.ticket, "preempted for good")
    with pytest.raises(LinkError, match="preempted for good"):
        running.client.collect(ticket)


def test_a_reservation_that_nobody_uses_expires(running):
    ticket = running.client.reserve(prompt_of(10), GREEDY, "kv", deadline_ms=100)
    with pytest.raises(LinkError, match="expired waiting for a start"):
        running.client.collect(ticket)
    ticket = running.client.reserve(prompt_of(10), GREEDY, "kv", deadline_ms=100)
    running.client.start(ticket, 3)
    with pytest.raises(LinkError, match="expired waiting for its KV"):
        running.client.collect(ticket)


def test_what_cannot_be_served_is_refused_and_holds_nothing(running):
    with pytest.raises(RequestError, match="max_tokens need 5010 cells"):
        running.client.reserve(prompt_of(5000), Sampling(max_tokens=10), "kv")
    with pytest.raises(RequestError, match="prompt has token ids outside"):
        running.client.reserve([1, 49_152], GREEDY, "local")
    with pytest.raises(RequestError, match="logit_bias has token ids outside"):
        running.client.reserve([1], Sampling(max_tokens=1, logit_bias={-1: 1.0}), "local")
    with pytest.raises(CodecError, match="raw, lz4, q8"):
        running.client.reserve([1], GREEDY, "kv", codec="zip")


def test_several_choices_each_have_the_prompt(running, context):
    prompt = prompt_of(90)
    expected, text = locally(running, prompt)
    ticket = running.client.reserve(prompt, GREEDY, "kv", choices=3)
    running.client.start(ticket, send_kv(running, context, ticket, prompt))
    answers, report = gather(running, ticket, 3)
    assert [(answer.ids, answer.text) for answer in answers] == [(expected, text)] * 3
    assert report.completion_tokens == 3 * GREEDY.max_tokens


def test_a_worker_computes_what_never_came(running, context):
    prompt = prompt_of(200)
    expected, _ = locally(running, prompt)
    ticket = running.client.reserve(prompt, GREEDY, "kv")
    send_kv(running, context, ticket, prompt, upto=128)
    eventually(lambda: running.sender.backlog_bytes == 0)
    running.client.send(Start(request_id=ticket.request_id, local=True))
    ids, _, last = running.client.collect(ticket)
    assert len(ids) == len(expected)
    assert last.report.local_prefill_ns > 0
    eventually(lambda: ticket.ticket in running.sender.take_failed())


def test_a_full_worker_says_so(running):
    tickets = [running.client.reserve(prompt_of(10), GREEDY, "local") for _ in range(MAX_SEQUENCES)]
    with pytest.raises(CapacityError, match=f"all {MAX_SEQUENCES} sequences"):
        running.client.reserve(prompt_of(10), GREEDY, "local")
    for ticket in tickets:
        running.client.abort(ticket)


def test_hello_compares_protocol_and_geometry(running):
    welcome = running.client.ask(Hello(geometry=running.geometry))
    assert isinstance(welcome, Welcome)
    assert welcome.landing.rope_order == "interleaved"
    other = msgspec.structs.replace(running.geometry, num_kv_heads=8)
    refusal = running.client.ask(Hello(geometry=other))
    assert isinstance(refusal, Failure)
    assert "num_kv_heads: 3 here, 8 there" in refusal.message
    refusal = running.client.ask(Hello(protocol=PROTOCOL + 1))
    assert isinstance(refusal, Failure)
    assert "protocol version differs" in refusal.message


@pytest.mark.parametrize(
    ("most_tokens", "inject_tokens_per_s", "chunk_tokens"),
    [(512, 1e6, 512), (512, 1e5, 224), (512, 1e3, 32), (20, 1e3, 20)],
)
def test_a_slow_injection_makes_chunks_smaller(most_tokens, inject_tokens_per_s, chunk_tokens):
    assert even_chunk_tokens(most_tokens, inject_tokens_per_s) == chunk_tokens
