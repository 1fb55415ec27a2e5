"""A real worker reuses KV: what it answers is what it would have answered without, and nothing is left in its cells.

KV is sent by the test, whole prompts computed in one batch: llama.cpp rounds KV differently in batches of other sizes.
Nor does it add up in the same order when the order of a sequence's cells is not that of its positions, so that answers
are compared word for word only where cells are filled and freed in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from cpu_decode.llama import Batch
from tests.cpu_decode.native_kv import elements_of, prefill
from tests.cpu_decode.serving import MAX_SEQUENCES, Running, serving
from tests.cpu_decode.test_worker import eventually, prompt_of
from transfer.errors import CodecError, LinkError, ProtocolError
from transfer.frames import Element
from transfer.messages import Sampling, Start, Ticket, Tokens

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
LONG = Sampling(max_tokens=1500, temperature=0.0, ignore_eos=True)
# Elements of one token in K and in V of a layer.
ROW = 3 * 64


@pytest.fixture(scope="module")
def running(model, geometry) -> Iterator[Running]:
    with serving(model, geometry, "bf16", pool_mib=64) as running:
        yield running


@pytest.fixture(scope="module")
def fresh_worker(model, geometry) -> Iterator[Running]:
    """A worker that never reuses anything."""
    with serving(model, geometry, "bf16") as running:
        yield running


@pytest.fixture(autouse=True)
def no_cell_is_left(running):
    yield

    def idle() -> bool:
        status = running.client.status()
        return not (status.used_cells or status.reserved_sequences or status.running_sequences or status.landing_bytes)

    eventually(idle)
    assert all(running.context.cached_tokens(seq_id) == 0 for seq_id in range(MAX_SEQUENCES + 1))
    # Nothing is pinned: all of it may go.
    assert not any(block.pins for block in blocks(running))


def blocks(running):
    return list(running.worker._promised.prefixes._tree._blocks)


class Prefilled:
    """A prompt's KV, as a prefill node would have computed it in one step, and the first token.

    What the prompt has in common with ``like`` has that one's KV, as with a prefix cache: llama.cpp rounds a token's KV
    a little differently beside other tokens.
    """

    def __init__(self, context, geometry, prompt: list[int], like: Prefilled | None = None) -> None:
        self.prompt = prompt
        self.first = int(prefill(context, 0, prompt).argmax())
        self.elements = elements_of(context.state(0), geometry, len(prompt))
        context.trim(0, 0)
        if like is not None:
            common = next(at for at, (a, b) in enumerate(zip(prompt, like.prompt, strict=False)) if a != b)
            for mine, theirs in zip(self.sides, like.sides, strict=True):
                mine[:, : common * ROW] = theirs[:, : common * ROW]

    @property
    def sides(self) -> list[np.ndarray]:
        """K rows and V rows, uint16 ``[num_layers, tokens * ROW]``, views."""
        return np.split(self.elements, 2, axis=1)

    def send(self, running, ticket: Ticket, num_tokens: int | None = None, *, finish: bool = True) -> None:
        """Send what the ticket lacks of the first ``num_tokens`` tokens."""
        end = num_tokens or len(self.prompt)
        running.sender.open(ticket)
        for start in range(ticket.reused_tokens, end, ticket.chunk_tokens):
            tokens = range(start, min(start + ticket.chunk_tokens, end))
            rows = slice(tokens.start * ROW, tokens.stop * ROW)
            part = np.ascontiguousarray(np.concatenate([side[:, rows] for side in self.sides], axis=1))
            assert running.sender.submit(ticket.ticket, tokens, 0, part, Element.BF16, 0)
        if finish:
            running.sender.finish(ticket.ticket, end)


def ask(running, kv: Prefilled, *, num_tokens: int | None = None, codec: str = "raw") -> tuple[list[int], Tokens]:
    """The answer to the first ``num_tokens`` tokens of a prompt, and its last message."""
    ticket = running.client.reserve(kv.prompt[:num_tokens], GREEDY, "kv", codec=codec)
    kv.send(running, ticket, num_tokens)
    running.client.start(ticket)
    ids, _, last = running.client.collect(ticket)
    assert last.report.kv_reused_tokens == ticket.reused_tokens
    return ids, last


def released(running) -> None:
    eventually(lambda: running.client.status().reserved_sequences == 0)


def test_the_same_prompt_again_needs_one_token_and_answers_the_same(running, context, geometry):
    kv = Prefilled(context, geometry, prompt_of(200, salt=1))
    fresh, first = ask(running, kv)
    assert first.report.kv_reused_tokens == 0
    again, last = ask(running, kv)
    assert again == fresh
    assert last.report.kv_reused_tokens == 199
    assert last.report.kv_raw_bytes == first.report.kv_raw_bytes // 200
    assert last.report.inject_ns > 0
    status = running.client.status()
    assert status.prefix_hits >= 1
    assert status.reused_tokens >= 199
    assert status.retained_bytes > first.report.kv_raw_bytes
    assert status.retained_sequences >= 1


@pytest.mark.parametrize("num_tokens", [17, 64, 65, 120])
def test_a_prompt_that_is_shorter_than_what_was_kept(running, context, num_tokens, geometry):
    kv = Prefilled(context, geometry, prompt_of(130, salt=10 + num_tokens))
    fresh, _ = ask(running, kv, num_tokens=num_tokens)
    ask(running, kv)
    again, last = ask(running, kv, num_tokens=num_tokens)
    assert again == fresh
    assert last.report.kv_reused_tokens == num_tokens - 1


def branches(context, geometry, system: list[int], count: int, like: Prefilled | None = None) -> list[Prefilled]:
    """Prompts that have ``system`` in common and its KV."""
    made: list[Prefilled] = []
    for number in range(count):
        prompt = [*system, *prompt_of(30, salt=1000 + number)]
        made.append(Prefilled(context, geometry, prompt, like or (made[0] if made else None)))
    return made


def test_prompts_that_branch_share_what_they_have_in_common(running, fresh_worker, context, geometry):
    system = prompt_of(100, salt=3)
    kvs = branches(context, geometry, system, 3)
    answers = [ask(running, kv) for kv in kvs]
    assert [last.report.kv_reused_tokens for _, last in answers] == [0, 100, 100]
    assert [ids for ids, _ in answers] == [ask(fresh_worker, kv)[0] for kv in kvs]


def test_a_follow_up_reuses_the_answer_too(running, context, geometry):
    question = prompt_of(100, salt=4)
    answer, _ = ask(running, Prefilled(context, geometry, question))
    follow_up = [*question, *answer, *prompt_of(30, salt=41)]
    ticket = running.client.reserve(follow_up, GREEDY, "local")
    # The answer's last token was never computed.
    kept_tokens = len(question) + len(answer) - 1
    assert ticket.reused_tokens == kept_tokens
    running.client.start(ticket)
    ids, _, last = running.client.collect(ticket)
    assert last.report.kv_reused_tokens == kept_tokens
    # One context that computes the same batches and never lets go of its KV.
    prefill(context, 0, question)
    context.trim(0, len(question) - 1)
    known = list(question)
    for _ in range(len(answer)):
        known.append(compute(context, known[-1:], len(known) - 1))
    assert known == follow_up[: len(known)]
    known = [*follow_up, compute(context, follow_up[kept_tokens:], kept_tokens)]
    while len(known) < len(follow_up) + len(ids):
        known.append(compute(context, known[-1:], len(known) - 1))
    assert ids == known[len(follow_up) :]


def compute(context, tokens: list[int], position: int) -> int:
    """The likeliest token after ``tokens``."""
    batch = Batch(len(tokens))
    row = batch.add(0, position, tokens, want_logits=True)
    context.decode(batch)
    return int(context.logits(row).argmax())


def test_a_whole_conversation_computes_new_text_only(running):
    conversation = prompt_of(70, salt=5)
    for turn in range(5):
        known = len(conversation) - 1 if turn else 0
        conversation += prompt_of(20, salt=50 + turn)
        ticket = running.client.reserve(conversation, GREEDY, "local")
        assert ticket.reused_tokens == known
        running.client.start(ticket)
        conversation += running.client.collect(ticket)[0]


def test_an_abort_after_the_prompt_keeps_it_and_one_before_does_not(running, fresh_worker, context, geometry):
    kv = Prefilled(context, geometry, prompt_of(200, salt=6))
    half = running.client.reserve(kv.prompt, GREEDY, "kv")
    kv.send(running, half, 128, finish=False)
    running.client.abort(half)
    released(running)
    ticket = running.client.reserve(kv.prompt, LONG, "kv")
    assert ticket.reused_tokens == 0
    kv.send(running, ticket)
    running.client.start(ticket, kv.first)
    eventually(lambda: running.client.status().running_sequences == 1)
    running.client.abort(ticket)
    released(running)
    ids, last = ask(running, kv)
    assert last.report.kv_reused_tokens == len(kv.prompt) - 1
    assert ids == ask(fresh_worker, kv)[0]


def test_a_transfer_that_fails_leaves_nothing_behind(running, context, geometry):
    kv = Prefilled(context, geometry, prompt_of(200, salt=8))
    early = running.client.reserve(kv.prompt, GREEDY, "kv")
    kv.send(running, early, 64)
    running.client.start(early, kv.first)
    with pytest.raises(ProtocolError, match="64 of 200 tokens landed"):
        running.client.collect(early)
    given_up = running.client.reserve(kv.prompt, GREEDY, "kv")
    kv.send(running, given_up, 128, finish=False)
    running.sender.abort(given_up.ticket, "preempted")
    with pytest.raises(LinkError, match="preempted"):
        running.client.collect(given_up)
    poisoned = running.client.reserve(kv.prompt, GREEDY, "kv")
    # In the last chunk: nothing is submitted after it, when the worker may have cancelled already.
    kv.elements[0, 195 * ROW] = 0x7F80
    kv.send(running, poisoned)
    with pytest.raises(CodecError):
        running.client.collect(poisoned)
    probe = running.client.reserve(kv.prompt, GREEDY, "kv")
    assert probe.reused_tokens == 0
    running.client.abort(probe)


def test_kv_of_lower_fidelity_serves_only_those_who_ask_for_it(running, context, geometry):
    kv = Prefilled(context, geometry, prompt_of(128, salt=9))
    lossy, _ = ask(running, kv, codec="q8")
    again, last = ask(running, kv, codec="q8")
    assert again == lossy
    assert last.report.kv_reused_tokens == 127
    for codec, reused_tokens in (("kvz1", 0), ("raw", 0), ("lz4", 127), ("kvz2", 127)):
        assert ask(running, kv, codec=codec)[1].report.kv_reused_tokens == reused_tokens
    ticket = running.client.reserve(kv.prompt, GREEDY, "local")
    assert ticket.reused_tokens == 127
    running.client.abort(ticket)


def test_a_running_sequence_lends_its_cells_and_may_leave_before_those_who_share_them(
    running, fresh_worker, context, geometry
):
    system = prompt_of(100, salt=12)
    donor = Prefilled(context, geometry, [*system, 99])
    kvs = branches(context, geometry, system, 3, donor)
    fresh = [ask(fresh_worker, kv)[0] for kv in kvs]
    first = running.client.reserve(donor.prompt, LONG, "kv")
    donor.send(running, first)
    running.client.start(first, donor.first)
    eventually(lambda: running.client.status().running_sequences == 1)
    tickets = [running.client.reserve(kv.prompt, GREEDY, "kv") for kv in kvs]
    assert [ticket.reused_tokens for ticket in tickets] == [100] * 3
    assert running.client.status().used_cells == 101 + LONG.max_tokens + 3 * (30 + GREEDY.max_tokens)
    running.client.abort(first)
    eventually(lambda: running.client.status().used_cells == 100 + 3 * (30 + GREEDY.max_tokens))
    for kv, ticket, ids in zip(kvs, tickets, fresh, strict=True):
        kv.send(running, ticket)
        running.client.start(ticket)
        assert running.client.collect(ticket)[0] == ids


def test_cells_that_are_lent_and_blocks_that_were_kept_go_together(running, fresh_worker, context, geometry):
    system = prompt_of(100, salt=13)
    longer = Prefilled(context, geometry, [*system, *prompt_of(80, salt=131)])
    ask(running, longer)
    donor = Prefilled(context, geometry, [*system, *prompt_of(10, salt=132)], longer)
    fresh, _ = ask(fresh_worker, longer)
    first = running.client.reserve(donor.prompt, LONG, "kv")
    donor.send(running, first)
    running.client.start(first, donor.first)
    eventually(lambda: running.client.status().running_sequences == 1)
    used_cells = running.client.status().used_cells
    ticket = running.client.reserve(longer.prompt, GREEDY, "kv")
    assert ticket.reused_tokens == 179
    assert running.client.status().used_cells == used_cells + 80 + GREEDY.max_tokens
    longer.send(running, ticket)
    running.client.start(ticket)
    assert running.client.collect(ticket)[0] == fresh
    running.client.abort(first)


def test_many_turns_at_once_answer_as_one_by_one(running, fresh_worker, context, geometry):
    kvs = branches(context, geometry, prompt_of(90, salt=14), 4)

    def begin(worker, kv: Prefilled) -> Ticket:
        ticket = worker.client.reserve(kv.prompt, GREEDY, "kv")
        kv.send(worker, ticket)
        worker.client.start(ticket, kv.first)
        return ticket

    fresh = [fresh_worker.client.collect(begin(fresh_worker, kv))[0] for kv in kvs]
    for _ in range(3):
        tickets = [begin(running, kv) for kv in kvs]
        answers = [running.client.collect(ticket)[0] for ticket in tickets]
        # Once one has ended, others may go on in its cells, in another order: logits then differ a little.
        assert [ids[:8] for ids in answers] == [ids[:8] for ids in fresh]
        released(running)
    assert [ticket.reused_tokens for ticket in tickets] == [len(kv.prompt) - 1 for kv in kvs]


def test_what_is_kept_stays_within_its_bytes_and_a_hot_prefix_stays(model, geometry, context):
    hot = Prefilled(context, geometry, prompt_of(100, salt=15))
    with serving(model, geometry, "bf16", pool_mib=8) as small:
        fresh, _ = ask(small, hot)
        ask(small, hot)
        for salt in range(151, 157):
            ask(small, Prefilled(context, geometry, prompt_of(120, salt=salt)))
            released(small)
            assert 4 << 20 < small.client.status().retained_bytes <= 8 << 20
        ids, last = ask(small, hot)
        assert (ids, last.report.kv_reused_tokens) == (fresh, 99)


@pytest.mark.parametrize("landed", [0, 128, 200])
@pytest.mark.parametrize("keep_first", [False, True])
def test_a_local_start_computes_what_has_not_landed(running, context, landed, keep_first, geometry):
    kv = Prefilled(context, geometry, prompt_of(200, salt=160 + landed + keep_first))
    ticket = running.client.reserve(kv.prompt, GREEDY, "kv")
    if landed:
        kv.send(running, ticket, landed, finish=False)
        # Buffers come back once their chunks are in the cells.
        eventually(lambda: running.client.status().landing_bytes == 0 and landed_tokens(running, ticket) == landed)
    first = kv.first if keep_first else None
    running.client.send(Start(request_id=ticket.request_id, first_token=first, local=True))
    ids, _, last = running.client.collect(ticket)
    assert len(ids) == GREEDY.max_tokens
    assert ids[0] == kv.first
    assert last.report.local_prefill_ns > 0
    again = running.client.reserve(kv.prompt, GREEDY, "local")
    assert again.reused_tokens == 199
    running.client.abort(again)
    if landed:
        eventually(lambda: ticket.ticket in running.sender.take_failed())


def landed_tokens(running, ticket: Ticket) -> int:
    sequence = running.worker.engine.batching._sequences.get(ticket.request_id)
    return sequence.num_cached if sequence else 0
