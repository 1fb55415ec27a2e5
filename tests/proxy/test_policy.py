"""The decision: what each policy picks, and that it can be made again from its inputs alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.costs import Cost
from proxy.facts import Ask, CodecFacts, Inputs, VllmFacts, WorkerFacts
from proxy.policy import decide, replay
from proxy.predictions import ALWAYS_LOCAL_TOKENS, computes_the_rest
from proxy.router import ROUTES

MS = 1_000_000
SEEN = 10


def cost(*ms: float, samples: int = SEEN) -> Cost:
    return Cost(tuple(each * MS for each in ms), samples)


def ask(**changes: Any) -> Ask:
    fields: dict[str, Any] = {
        "prompt_tokens": 1000,
        "answer_tokens": 65,
        "choices": 1,
        "routes": ROUTES,
        "reason": None,
        "policy": "min_e2e",
        "slo_ttft_ns": 0,
        "slo_tpot_ns": 0,
        "turn": 0,
        "may_try": True,
        "worker_samples": False,
    }
    return Ask(**fields | changes)


def vllm(**changes: Any) -> VllmFacts:
    """1 s for the prompt, 40 ms a token."""
    fields: dict[str, Any] = {
        "prefill": cost(1, 0),
        "step": cost(40, 0, 0),
        "backlog_ns": 0,
        "sequences": 0,
        "context_tokens": 0,
        "cached_tokens": 0,
    }
    return VllmFacts(**fields | changes)


def worker(name: str = "w", **changes: Any) -> WorkerFacts:
    """4 s for the prompt, 10 ms a token and 5 for each sequence; 100 ms of the transfer show."""
    fields: dict[str, Any] = {
        "name": name,
        "prefill": cost(4, 0, 0),
        "step": cost(10, 5, 0),
        "queue_ns": 0,
        "backlog_ns": 0,
        "load": 0.0,
        "sequences": 0,
        "context_tokens": 0,
        "held_tokens": 0,
        "codecs": (CodecFacts("raw", cost(0, 100)),),
    }
    return WorkerFacts(**fields | changes)


def inputs(*workers: WorkerFacts, at_vllm: VllmFacts | None = None, **asked: Any) -> Inputs:
    return Inputs(ask(**asked), at_vllm or vllm(), workers or (worker(),))


def test_what_each_route_would_take():
    predicted = decide(inputs()).predicted
    assert {route: (each.ttft_ns // MS, each.e2e_ns // MS) for route, each in predicted.items()} == {
        "split": (1000, 1000 + 100 + 64 * 15),
        "gpu": (1000, 1000 + 64 * 40),
        "cpu": (4000, 4000 + 64 * 15),
    }


@pytest.mark.parametrize(
    ("changes", "route"),
    [
        ({}, "split"),
        ({"answer_tokens": 1}, "split"),
        # A long answer is made where tokens are cheap.
        ({"answer_tokens": 2000}, "split"),
        ({"at_vllm": vllm(step=cost(10, 0, 0))}, "gpu"),
        # vLLM is busy for so long that the worker's slow prefill is done sooner.
        ({"at_vllm": vllm(backlog_ns=4000 * MS)}, "cpu"),
        ({"at_vllm": vllm(cached_tokens=1000)}, "split"),
        ({"policy": "min_ttft"}, "split"),
    ],
)
def test_the_least_is_chosen(changes, route):
    decision = decide(inputs(**changes))
    assert (decision.route, decision.reason) == (route, changes.get("policy", "min_e2e"))


def at_nodes(*nodes: VllmFacts, **asked: Any) -> Inputs:
    return Inputs(ask(**asked), nodes[0], (worker(),), nodes[1:])


@pytest.mark.parametrize(
    ("first", "second", "node"),
    [
        ({}, {}, "a"),
        # The other card is faster, by much and by little.
        ({}, {"prefill": cost(0.5, 0)}, "b"),
        ({}, {"prefill": cost(0.95, 0)}, "a"),
        ({}, {"cached_tokens": 900}, "b"),
        # One prefill more may wait for the preferred one, not two.
        ({"backlog_ns": 50 * MS}, {}, "a"),
        ({"backlog_ns": 1500 * MS}, {}, "b"),
        ({"backlog_ns": 1500 * MS}, {"backlog_ns": 1400 * MS}, "a"),
        # What is known of the other is little: it may be as good.
        ({"prefill": cost(1.5, 0, samples=1)}, {}, "a"),
        ({"prefill": cost(9, 0, samples=1)}, {}, "b"),
        ({"prefill": None, "step": None}, {"prefill": None, "step": None}, "a"),
    ],
)
def test_the_prefill_node_is_the_one_by_which_vllm_is_best(first, second, node):
    decision = decide(at_nodes(vllm(name="a", **first), vllm(name="b", **second), routes=("split", "gpu")))
    assert decision.prefill_node == node


def test_many_that_decode_at_one_node_send_the_next_to_another():
    step = cost(40, 0, 0)
    busy = vllm(name="a", step=step, prefill=cost(0.001, 0), sequences=5)
    for fewer, node in ((1, "a"), (0, "b")):
        other = vllm(name="b", step=step, prefill=cost(0.001, 0), sequences=fewer)
        assert decide(at_nodes(busy, other, routes=("gpu",))).prefill_node == node


def test_entries_from_before_there_were_several_prefill_nodes_can_be_replayed():
    whole = msgspec.to_builtins(inputs())
    assert len(whole[1]) == 7
    old = [whole[0], whole[1][:6], whole[2]]
    assert replay(old) == decide(inputs())


def test_a_busy_worker_loses_to_vllm_and_another_worker():
    busy = worker("busy", sequences=10, load=0.6)
    assert decide(inputs(busy, prompt_tokens=100)).route == "gpu"
    assert decide(inputs(busy, worker("free"))).worker == "free"


def crowded(*ms: float) -> Cost:
    """Twice as much while the other engine is busy."""
    return msgspec.structs.replace(cost(*ms), crowding=1.0)


# Long steps, hardly longer for many, and short ones, longer for each sequence.
AT_VLLM = {"prefill": crowded(1, 20), "step": crowded(22, 0.9, 0)}
AT_WORKER = {"prefill": crowded(5, 30, 0), "step": crowded(4, 4, 0), "codecs": (CodecFacts("raw", cost(0, 5)),)}


def chat(at_vllm: dict[str, Any] = AT_VLLM, at_worker: dict[str, Any] = AT_WORKER, **asked: Any) -> Inputs:
    """A short prompt and a short answer."""
    asked = {"prompt_tokens": 64, "answer_tokens": 24, "may_try": False} | asked
    return inputs(worker(**at_worker), at_vllm=vllm(**at_vllm), **asked)


def busy(facts: dict[str, Any], sequences: int) -> dict[str, Any]:
    return facts | {"sequences": sequences, "context_tokens": 76 * sequences}


@pytest.mark.parametrize(
    ("at_vllm", "at_worker", "arriving", "route"),
    [
        (0, 0, 0, "split"),
        (0, 3, 0, "split"),
        (0, 0, 15, "gpu"),
        (15, 0, 0, "gpu"),
        # Alone at vLLM it takes longer than beside them; but all do, if they leave.
        (0, 15, 0, "gpu"),
        (1000, 0, 1000, "gpu"),
    ],
)
def test_where_engines_slow_each_other_all_go_where_together_they_take_least(at_vllm, at_worker, arriving, route):
    assert decide(chat(busy(AT_VLLM, at_vllm), busy(AT_WORKER, at_worker), arriving=arriving)).route == route


def test_machines_of_their_own_are_both_used():
    at_vllm = {"prefill": cost(1, 20), "step": cost(22, 0.9, 0)}
    at_worker = {"prefill": cost(5, 30, 0), "step": cost(4, 4, 0)}
    taken = Counter()
    for _ in range(16):
        at_workers = taken["split"] + taken["cpu"]
        taken[decide(chat(busy(at_vllm, taken["gpu"]), busy(at_worker, at_workers))).route] += 1
    assert 4 <= taken["gpu"] <= 12


def test_a_decision_of_an_older_make_can_be_read():
    built = msgspec.to_builtins(chat())
    del built[0][-1]
    for costs in (built[1][0], built[1][1], built[2][0][1], built[2][0][2]):
        del costs[-1]
    assert replay(built).route == "split"


def test_the_preferred_worker_is_kept_for_a_little_more_and_not_for_much_load():
    assert decide(inputs(worker("first", step=cost(10.5, 5, 0)), worker("second"))).worker == "first"
    assert decide(inputs(worker("first", step=cost(20, 5, 0)), worker("second"))).worker == "second"
    assert decide(inputs(worker("first", load=0.5), worker("second"))).worker == "second"


def test_the_worker_that_holds_the_prefix_gets_the_request_until_waiting_costs_more():
    holder = worker("holder", held_tokens=990)
    chosen = decide(inputs(worker("first"), holder))
    assert (chosen.route, chosen.worker) == ("cpu", "holder")
    # Full for a while: worth waiting for.
    assert decide(inputs(worker("first"), msgspec.structs.replace(holder, queue_ns=500 * MS))).worker == "holder"
    moved = decide(inputs(worker("first"), msgspec.structs.replace(holder, queue_ns=5000 * MS)))
    assert (moved.route, moved.worker) == ("split", "first")


def test_patience_is_what_the_next_best_route_leaves():
    waiting = worker(queue_ns=200 * MS)
    decision = decide(inputs(waiting))
    assert decision.route == "split"
    gap = decision.predicted["gpu"].e2e_ns - (decision.predicted["split"].e2e_ns - 200 * MS)
    assert decision.patience_ns == gap > 200 * MS
    assert decide(inputs(waiting, routes=("split",), reason="forced")).patience_ns is None


def test_time_to_first_token_may_be_bought_with_the_rest():
    slow_link = worker(codecs=(CodecFacts("raw", cost(0, 9000)),), prefill=cost(1.5, 0, 0))
    assert decide(inputs(slow_link, policy="min_ttft", may_try=False)).route == "gpu"
    assert decide(inputs(slow_link, policy="min_ttft", at_vllm=vllm(step=cost(400, 0, 0)))).route == "split"
    assert decide(inputs(slow_link)).route == "cpu"


def test_where_the_worker_samples_the_first_token_waits_for_the_kv():
    assert decide(inputs(worker_samples=True)).predicted["split"].ttft_ns == (1000 + 100 + 15) * MS


@pytest.mark.parametrize(
    ("ttft_ms", "tpot_ms", "route"),
    [
        # Only tpot counts: split 16.5, gpu 40, cpu 15.
        (0, 50, "cpu"),
        # Only ttft: split and gpu are equal, split ends sooner.
        (2000, 0, "split"),
        (2000, 100, "split"),
        # Neither can be met; split misses least.
        (100, 1, "split"),
        (0, 0, "split"),
    ],
)
def test_objectives(ttft_ms, tpot_ms, route):
    asked = {"policy": "max_goodput", "slo_ttft_ns": ttft_ms * MS, "slo_tpot_ns": tpot_ms * MS}
    decision = decide(inputs(**asked))
    assert (decision.route, decision.reason) == (route, "max_goodput")


def test_round_robin_alternates_whole_engines():
    turns = [decide(inputs(policy="round_robin", turn=turn)) for turn in range(4)]
    assert [turn.route for turn in turns] == ["gpu", "cpu", "gpu", "cpu"]
    assert {turn.reason for turn in turns} == {"round_robin"}
    assert decide(inputs(policy="round_robin", routes=("split", "cpu"), turn=1)).route == "cpu"
    unknown = vllm(prefill=None, step=None)
    assert decide(inputs(policy="round_robin", at_vllm=unknown)).route == "gpu"


def test_where_nothing_is_known_it_is_split():
    nothing = inputs(worker(prefill=None, step=None), at_vllm=vllm(prefill=None, step=None))
    assert decide(nothing)[:4] == ("split", "w", "raw", "cold")
    assert not decide(nothing).predicted


def test_a_route_that_was_never_taken_is_tried_by_one_request_at_a_time():
    unknown = vllm(step=None)
    assert decide(inputs(at_vllm=unknown))[:4:3] == ("gpu", "explores")
    assert decide(inputs(at_vllm=unknown, may_try=False)).route == "split"
    # Seen once, and not much slower: once more.
    once = vllm(step=cost(40, 0, 0, samples=1))
    assert decide(inputs(at_vllm=once))[:4:3] == ("gpu", "explores")
    slow = vllm(step=cost(400, 0, 0, samples=1))
    assert decide(inputs(at_vllm=slow)).route == "split"


def test_a_reason_that_is_given_stays_and_nothing_is_tried():
    failed_over = inputs(at_vllm=vllm(step=None), reason="failed_over")
    assert decide(failed_over)[:4:3] == ("split", "failed_over")
    assert decide(inputs(routes=("cpu",), reason="prefill_down"))[:4:3] == ("cpu", "prefill_down")


def test_a_codec_is_chosen_where_the_link_shows():
    raw, zstd, lz4 = CodecFacts("raw", cost(0, 100)), CodecFacts("zstd", cost(0, 50)), CodecFacts("lz4", None)
    assert decide(inputs(worker(codecs=(raw, zstd, lz4)))).codec == "raw"
    slow = CodecFacts("raw", cost(0, 500))
    assert decide(inputs(worker(codecs=(slow, zstd)))).codec == "zstd"
    assert decide(inputs(worker(codecs=(slow, zstd, lz4)))).codec == "lz4"
    assert decide(inputs(worker(codecs=(slow, zstd, lz4)), may_try=False)).codec == "zstd"


def test_a_worker_that_cannot_take_kv_computes_itself():
    assert decide(inputs(worker(codecs=()), at_vllm=vllm(backlog_ns=10**11))).route == "cpu"


@pytest.mark.parametrize(("vllm_ms", "local"), [(0.25, False), (0.5, True)])
def test_the_rest_of_a_cached_prompt_is_computed_where_it_takes_less_time(vllm_ms, local):
    """100 tokens take the worker 400 ms; vLLM computes all 1,000, and 100 ms of the transfer show."""
    known = inputs(at_vllm=vllm(prefill=cost(vllm_ms, 0)))
    assert computes_the_rest(known, "w", "raw", 900) is local
    assert not computes_the_rest(known, "w", "raw", 0)
    assert not computes_the_rest(known, "another", "raw", 900)


def test_where_nothing_is_known_a_few_missing_tokens_are_computed_where_they_are_needed():
    unknown = inputs(at_vllm=vllm(prefill=None))
    assert computes_the_rest(unknown, "w", "raw", 1000 - ALWAYS_LOCAL_TOKENS)
    assert not computes_the_rest(unknown, "w", "raw", 1000 - ALWAYS_LOCAL_TOKENS - 1)


def costs(terms: int) -> st.SearchStrategy[Cost | None]:
    ns = st.tuples(*[st.floats(0, 1e9)] * terms)
    return st.none() | st.builds(Cost, ns, st.integers(1, 100), st.sampled_from(["learned", "calibrated"]))


counts = st.integers(0, 10_000)
durations = st.integers(0, 10**12)
codec_facts = st.builds(CodecFacts, st.sampled_from(["raw", "lz4", "zstd", "q8"]), costs(2))
worker_facts = st.builds(
    WorkerFacts,
    name=st.sampled_from("abc"),
    prefill=costs(3),
    step=costs(3),
    queue_ns=durations,
    backlog_ns=durations,
    load=st.floats(0, 2),
    sequences=counts,
    context_tokens=counts,
    held_tokens=counts,
    codecs=st.lists(codec_facts, min_size=1, max_size=3).map(tuple),
)
vllm_facts = st.builds(VllmFacts, costs(2), costs(3), durations, counts, counts, counts, st.sampled_from("abcd"))
any_inputs = st.builds(
    Inputs,
    st.builds(
        Ask,
        # Nobody holds more than there is.
        prompt_tokens=st.integers(10_000, 100_000),
        answer_tokens=st.integers(1, 4096),
        choices=st.integers(1, 4),
        routes=st.lists(st.sampled_from(ROUTES), min_size=1, unique=True).map(tuple),
        reason=st.none() | st.sampled_from(["forced", "failed_over", "decode_down"]),
        policy=st.sampled_from(["min_ttft", "min_e2e", "max_goodput", "round_robin"]),
        slo_ttft_ns=durations,
        slo_tpot_ns=durations,
        turn=counts,
        may_try=st.booleans(),
        worker_samples=st.booleans(),
    ),
    st.builds(VllmFacts, costs(2), costs(3), durations, counts, counts, counts),
    st.lists(worker_facts, min_size=1, max_size=4).map(tuple),
    st.lists(vllm_facts, max_size=3, unique_by=lambda node: node.name).map(tuple),
)


@given(any_inputs)
def test_any_decision_can_be_made_again_from_what_the_ledger_says(known):
    decision = decide(known)
    assert replay(known) == decision
    assert replay(msgspec.json.decode(msgspec.json.encode(known))) == decision
    assert decision.route in known.ask.routes
    assert known.at(decision.prefill_node).vllm.name == decision.prefill_node
    assert (decision.worker is None) is (decision.route == "gpu")
    assert (decision.codec is None) is (decision.route != "split")
    if decision.reason in ("min_e2e", "min_ttft"):
        chosen = decision.predicted.get(decision.route)
        field = "e2e_ns" if known.ask.policy == "min_e2e" else "ttft_ns"
        least = min((getattr(each, field) for each in decision.predicted.values()), default=None)
        assert chosen is None or getattr(chosen, field) == least
