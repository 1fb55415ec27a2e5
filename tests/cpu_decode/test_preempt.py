"""A real worker that promises fewer cells than answers may need: who loses them goes on, with the same words."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cpu_decode.asking import ask, gather
from tests.cpu_decode.native_kv import elements_of
from tests.cpu_decode.serving import MAX_SEQUENCES, Running, serving
from tests.cpu_decode.test_worker import eventually, prompt_of, send_kv
from transfer.messages import Sampling

# Four of these need 4 * 190 cells.
LONG = Sampling(max_tokens=150, temperature=0.0, ignore_eos=True)
PROMPTS = [prompt_of(40, salt=n) for n in range(4)]


@pytest.fixture(scope="module")
def running(model, geometry) -> Iterator[Running]:
    with serving(model, geometry, "bf16", num_cells=448, promised_share=0.1) as running:
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


@pytest.mark.parametrize("sampling", [LONG, Sampling(max_tokens=150, temperature=1.0, seed=5, top_k=1)])
def test_answers_that_outgrow_their_cells_are_those_of_an_empty_worker(running, context, sampling):
    alone = []
    for prompt in PROMPTS:
        answers, report = gather(running, start(running, context, prompt, sampling), 1)
        assert report.preemptions == 0
        alone.append(answers[0])
    tickets = [start(running, context, prompt, sampling) for prompt in PROMPTS]
    assert running.client.status().used_cells == 4 * (40 + 15)
    together = [gather(running, ticket, 1) for ticket in tickets]
    assert [answers[0] for answers, _ in together] == alone
    preemptions = [report.preemptions for _, report in together]
    # The oldest is never asked to wait, others are.
    assert preemptions[0] == 0
    assert sum(preemptions) >= 1


def test_a_prompt_that_lands_takes_the_cells_of_the_newest(running, context):
    older = [start(running, context, prompt, LONG) for prompt in PROMPTS[:2]]
    eventually(lambda: grown(running, older) > 280, 20)
    expected = ask(running, Sampling(max_tokens=1, temperature=0.0), prompt_of(9))
    assert expected.finish_reason == "length"
    landing = running.client.reserve(prompt_of(200), Sampling(max_tokens=4, temperature=0.0, ignore_eos=True), "kv")
    running.client.start(landing, send_kv(running, context, landing, prompt_of(200)))
    _, report = gather(running, landing, 1)
    assert report.completion_tokens == 4
    reports = [gather(running, ticket, 1)[1] for ticket in older]
    assert [report.completion_tokens for report in reports] == [150, 150]
    assert sum(report.preemptions for report in reports) >= 1


def grown(running: Running, tickets) -> int:
    """Cells that the sequences of ``tickets`` hold."""
    sequences = [running.worker.engine._sequences.get(ticket.request_id) for ticket in tickets]
    return sum(sequence.num_cached for sequence in sequences if sequence)


def test_a_request_that_waits_in_ram_can_be_aborted(running, context):
    tickets = [start(running, context, prompt) for prompt in PROMPTS]
    eventually(lambda: running.client.status().preempted_sequences > 0, 20)
    for ticket in reversed(tickets):
        running.client.abort(ticket)
    eventually(lambda: running.client.status().preempted_sequences == 0)


def test_who_shares_cells_with_one_that_lost_them_gets_its_kv(model, geometry):
    """The engine learns of the sharing after the preemption: it takes the KV from RAM."""
    from cpu_decode.engine import Engine
    from cpu_decode.llama import Context
    from cpu_decode.reuse import Plan
    from cpu_decode.sampling import Sampler
    from cpu_decode.sequence import Sequence
    from cpu_decode.speculate import NO_GUESSING
    from transfer.messages import Reserve

    own = Context(model, num_cells=512, max_sequences=2, batch_tokens=128, threads=1, cell_type="bf16")
    engine = Engine(own, batch_tokens=128, emit=lambda _: None, wake=lambda: None, guessing=NO_GUESSING)

    def sequence(name: str, seq_id: int) -> Sequence:
        asked = Reserve(request_id=name, prompt=prompt_of(60), sampling=LONG, source="local")
        return Sequence(asked, seq_id, Sampler(model, asked), reused_tokens=50 if seq_id else 0)

    donor, sharer = sequence("donor", 0), sequence("sharer", 1)
    engine._admit(donor, Plan())
    engine._begin("donor", None, False, 0)
    engine._step()
    before = own.state(0)
    assert engine._preempt_newest()
    assert own.cached_tokens(0) == 0
    engine._admit(sharer, Plan(50, donor=0, shared_tokens=50))
    engine._copies.run()
    assert sharer.num_cached == 50
    assert own.cached_tokens(1) == 50
    expected = elements_of(before, geometry, 60)
    row = geometry.num_kv_heads * geometry.head_dim_k
    got = elements_of(own.state(1), geometry, 50)
    assert (got[:, : 50 * row] == expected[:, : 50 * row]).all()
    assert (got[:, 50 * row :] == expected[:, 60 * row : 110 * row]).all()
    own.close()
