"""Several answers to one prompt: its cells are shared, and everything else is as for single answers."""

from __future__ import annotations

import time

import msgspec
import pytest

from tests.cpu_decode.asking import PROMPT, ask, ask_for_choices, gather
from tests.cpu_decode.serving import MAX_SEQUENCES
from transfer.errors import CapacityError, RequestError
from transfer.messages import Sampling

GREEDY = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
SEEDED = Sampling(max_tokens=8, temperature=1.2, seed=5, ignore_eos=True)


@pytest.fixture(autouse=True)
def nothing_leaks(running):
    yield
    deadline = time.monotonic() + 20
    while (status := running.client.status()).used_cells or status.reserved_sequences or status.running_sequences:
        assert time.monotonic() < deadline, status
        time.sleep(0.02)
    assert all(running.context.cached_tokens(seq_id) == 0 for seq_id in range(MAX_SEQUENCES + 1))


def test_greedy_choices_are_equal(running):
    answers, report = ask_for_choices(running, GREEDY, 3)
    alone = ask(running, GREEDY)
    assert answers == [alone] * 3
    assert (report.prompt_tokens, report.completion_tokens) == (len(PROMPT), 24)


def test_seeded_choices_are_the_answers_of_consecutive_seeds(running):
    # Few tokens and few candidates: a step over three sequences rounds logits differently from a step over one.
    few = msgspec.structs.replace(SEEDED, max_tokens=4, top_k=3)
    answers, _ = ask_for_choices(running, few, 3)
    singles = [ask(running, msgspec.structs.replace(few, seed=5 + choice)) for choice in range(3)]
    assert answers == singles
    assert len({tuple(answer.ids) for answer in answers}) == 3


def test_choices_share_a_first_token_that_comes_with_start(running):
    ticket = running.client.reserve(PROMPT, SEEDED, "local", choices=3)
    running.client.start(ticket, 905)
    answers, _ = gather(running, ticket, 3)
    assert [answer.ids[0] for answer in answers] == [905] * 3
    assert len({tuple(answer.ids) for answer in answers}) == 3


def test_a_first_token_that_ends_all_choices_ends_the_request(running):
    ticket = running.client.reserve(PROMPT, msgspec.structs.replace(GREEDY, max_tokens=1), "local", choices=2)
    running.client.start(ticket, 905)
    answers, report = gather(running, ticket, 2)
    assert [answer.ids for answer in answers] == [[905], [905]]
    assert report.completion_tokens == 2


def test_the_request_goes_on_until_its_last_choice_ends(running):
    # Without ignore_eos and with a likely end, the choices end at different steps.
    uneven = Sampling(max_tokens=24, temperature=1.0, seed=3, logit_bias={2: 12.0})
    answers, report = ask_for_choices(running, uneven, 4)
    assert len({len(answer.ids) for answer in answers}) > 1
    assert report.completion_tokens == sum(len(answer.ids) for answer in answers)


def test_cells_for_the_prompt_are_promised_once(running):
    prompt = [(7 * i + 3) % 40_000 for i in range(1000)]
    ticket = running.client.reserve(prompt, msgspec.structs.replace(GREEDY, max_tokens=500), "kv", choices=4)
    status = running.client.status()
    assert (status.used_cells, status.reserved_sequences) == (3000, 4)
    with pytest.raises(CapacityError):
        running.client.reserve(prompt, msgspec.structs.replace(GREEDY, max_tokens=50), "kv", choices=3)
    after = running.client.status()
    assert (after.used_cells, after.reserved_sequences) == (3000, 4)
    running.client.abort(ticket)


def test_abort_takes_all_choices_along(running):
    ticket = running.client.reserve(PROMPT, msgspec.structs.replace(GREEDY, max_tokens=900), "local", choices=3)
    running.client.start(ticket)
    running.client.next_tokens(ticket)
    running.client.abort(ticket)


def test_more_choices_than_could_ever_be_served_are_refused(running):
    with pytest.raises(RequestError, match="n must be 1 to"):
        ask_for_choices(running, GREEDY, MAX_SEQUENCES + 1)
    with pytest.raises(RequestError, match="8006 cells"):
        ask_for_choices(running, msgspec.structs.replace(GREEDY, max_tokens=2000), 4)
