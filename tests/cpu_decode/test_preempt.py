"""A real worker that promises fewer cells than answers may need: who loses them goes on, with the same words."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from cpu_decode.batching import Batching
from cpu_decode.llama import Context
from cpu_decode.reuse import Plan
from cpu_decode.sampling import Sampler
from cpu_decode.sequence import Sequence
from cpu_decode.speculate import NO_GUESSING
from cpu_decode.state import StateBlob
from tests.cpu_decode.asking import gather
from tests.cpu_decode.native_kv import elements_of
from tests.cpu_decode.serving import MAX_SEQUENCES, Running, serving
from tests.cpu_decode.test_worker import eventually, prompt_of, send_kv
from transfer.messages import Reserve, Sampling

NOTHING = Plan()
# Three of these need 3 * 140 cells.
LONG = Sampling(max_tokens=100, temperature=0.0, ignore_eos=True)
PROMPTS = [prompt_of(40, salt=n) for n in range(3)]


@pytest.fixture(scope="module")
def running(model, geometry) -> Iterator[Running]:
    with serving(model, geometry, "bf16", num_cells=256, promised_share=0.1) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_leaks(running):
    yield
    eventually(lambda: running.client.status().used_cells == 0)
    status = running.client.status()
    assert (status.preempted_sequences, status.running_sequences) == (0, 0)
    assert all(running.context.cached_tokens(seq_id) == 0 for seq_id in range(MAX_SEQUENCES + 1))


def start(running: Running, context, prompt: list[int], sampling: Sampling = LONG):
    ticket = running.client.reserve(prompt, sampling, "kv")
    running.client.start(ticket, send_kv(running, context, ticket, prompt))
    return ticket


def test_answers_that_outgrow_their_cells_are_those_of_an_empty_worker(running, context):
    alone = []
    for prompt in PROMPTS:
        answers, report = gather(running, start(running, context, prompt), 1)
        assert report.preemptions == 0
        alone.append(answers[0])
    tickets = [start(running, context, prompt) for prompt in PROMPTS]
    assert running.client.status().used_cells == 3 * (40 + 10)
    together = [gather(running, ticket, 1) for ticket in tickets]
    assert [answers[0] for answers, _ in together] == alone
    preemptions = [report.preemptions for _, report in together]
    # The oldest is never asked to wait, others are.
    assert preemptions[0] == 0
    assert sum(preemptions) >= 1


def test_a_request_that_waits_in_ram_can_be_aborted(running, context):
    tickets = [start(running, context, prompt) for prompt in PROMPTS]
    eventually(lambda: running.client.status().preempted_sequences > 0, 20)
    for ticket in reversed(tickets):
        running.client.abort(ticket)
    eventually(lambda: running.client.status().preempted_sequences == 0)


class Stepping:
    """An engine whose steps the test makes, over few cells, which llama.cpp makes in multiples of 256."""

    def __init__(self, model, num_cells: int) -> None:
        self.context = Context(
            model, num_cells=num_cells, max_sequences=2, batch_tokens=256, threads=1, cell_type="bf16"
        )
        self.engine = Batching(
            self.context, batch_tokens=256, emit=lambda _: None, answer=lambda *_: None, guessing=NO_GUESSING
        )

    def admit(self, name: str, seq_id: int, plan: Plan = NOTHING) -> Sequence:
        reserve = Reserve(request_id=name, prompt=prompt_of(150), sampling=LONG, source="local")
        sequence = Sequence(reserve, seq_id, Sampler(self.context.model, reserve), plan.num_tokens)
        self.engine.admit(sequence, plan)
        return sequence


def test_a_chunk_that_lands_takes_the_cells_of_the_newest(model):
    stepping = Stepping(model, num_cells=256)
    engine, context = stepping.engine, stepping.context
    running, landing = stepping.admit("running", 0), stepping.admit("landing", 1)
    engine.begin("running", None, False, 0)
    engine.step()
    state = context.state(0)
    engine._inject(landing, StateBlob(state, state.size, 0, 150))
    assert (landing.num_cached, context.cached_tokens(1)) == (150, 150)
    assert (running.num_cached, context.cached_tokens(0), engine.preempted_sequences) == (0, 0, 1)
    engine._resume()
    assert engine.preempted_sequences == 1
    engine.abort("landing")
    engine._copies.run()
    engine._resume()
    assert (running.num_cached, engine.preempted_sequences, running.preemptions) == (150, 0, 1)
    assert np.array_equal(context.state(0), state)
    context.close()


def test_who_shares_cells_with_one_that_lost_them_gets_its_kv(model, geometry):
    """The engine learns of the sharing after the preemption: it takes the KV from RAM."""
    stepping = Stepping(model, num_cells=512)
    engine, context = stepping.engine, stepping.context
    stepping.admit("donor", 0)
    engine.begin("donor", None, False, 0)
    engine.step()
    before = context.state(0)
    assert engine._preempt_newest()
    assert context.cached_tokens(0) == 0
    sharer = stepping.admit("sharer", 1, Plan(50, donor=0, shared_tokens=50))
    engine._copies.run()
    assert (sharer.num_cached, context.cached_tokens(1)) == (50, 50)
    expected = elements_of(before, geometry, 150)
    row = geometry.num_kv_heads * geometry.head_dim_k
    got = elements_of(context.state(1), geometry, 50)
    assert (got[:, : 50 * row] == expected[:, : 50 * row]).all()
    assert (got[:, 50 * row :] == expected[:, 150 * row : 200 * row]).all()
    context.close()
