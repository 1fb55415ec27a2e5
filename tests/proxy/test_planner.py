"""What the router does with a whole proxy around it: learning, policies, full workers, replay from the ledger."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from proxy.costs import Cost
from proxy.estimates import AnswerLengths, Estimates
from proxy.ledger import Entry
from proxy.load import Watch
from proxy.policy import replay
from proxy.router import ROUTES
from tests.proxy.conftest import Stack, make_cluster, running, wait_until
from transfer.messages import Failure, Reserve, Status

FULL = Failure(code="capacity_exceeded", message="no room")


@pytest.fixture
def fresh(stack: Stack) -> Stack:
    """Nothing has been learned yet."""
    stack.gateway.dispatcher.planner.estimates = Estimates()
    return stack


def test_what_is_not_known_is_tried_and_then_the_best_is_taken(fresh):
    fresh.worker.script.prefill_tokens_per_s = 0.0
    # The last status may still say how fast its own prefill is.
    wait_until(lambda: (said := fresh.gateway.workers.any_status) and not said.prefill_tokens_per_s)
    for _ in range(8):
        assert fresh.chat().status_code == 200
    entries = fresh.entries()
    assert [entry["reason"] for entry in entries[:2]] == ["cold", "explores"]
    assert [entry["route"] for entry in entries[:2]] == ["split", "gpu"]
    assert entries[-1]["reason"] == "min_e2e"
    assert {entry["route"] for entry in entries} >= {"split", "gpu"}


def test_every_decision_can_be_made_again_from_the_ledger(fresh):
    for headers in ({}, {}, {}, {"X-Isthmus-Route": "gpu"}, {"X-Isthmus-Route": "cpu"}, {}):
        assert fresh.chat(headers).status_code == 200
    for entry in fresh.entries():
        decision = replay(entry["decision"])
        assert (decision.route, decision.reason) == (entry["route"], entry["reason"])
        assert decision.worker == entry["worker"]
        assert decision.codec == entry["codec"]
        assert msgspec.to_builtins(decision.predicted) == entry["predicted"]


def test_predictions_stand_beside_what_happened(fresh):
    for route in ("split", "gpu", "cpu", "split", "gpu", "cpu"):
        fresh.chat({"X-Isthmus-Route": route})
    fresh.chat()
    entry = fresh.entries()[-1]
    assert set(entry["predicted"]) == set(ROUTES)
    assert all(each["e2e_ns"] >= each["ttft_ns"] > 0 for each in entry["predicted"].values())
    assert entry["e2e_error"] > -1
    assert entry["ttft_error"] > -1
    text = fresh.http.get("/metrics").text
    assert f'isthmus_estimate_error_ratio_count{{route="{entry["route"]}",what="e2e"}}' in text


def test_forced_runs_of_a_request_show_what_another_route_would_have_taken(fresh):
    fresh.chat({"X-Isthmus-Route": "gpu"}, max_tokens=3)
    fresh.chat(max_tokens=3)
    forced, chosen = fresh.entries()
    assert forced["regret_ns"] is None
    assert chosen["reason"] in ("cold", "explores")
    assert chosen["regret_ns"] >= 0


def test_what_went_on_beside_a_request_is_in_the_ledger(fresh):
    for route in ("split", "gpu", "cpu"):
        fresh.chat({"X-Isthmus-Route": route})
    for entry in fresh.entries():
        assert set(entry["beside"]) == {"prefill", "decode"}
        sequences, _, prefilled_tokens, crowd = entry["beside"]["decode"]
        assert (sequences, prefilled_tokens, crowd) == (1, 0, 0)
        assert entry["beside"]["prefill"][2] == entry["prompt_tokens"]


def test_a_prompt_counts_in_its_own_prefill_and_not_in_its_own_decode_however_short_that_is(fresh, monkeypatch):
    monkeypatch.setattr(Watch, "together_ns", 0)
    for route in ("split", "gpu", "cpu"):
        fresh.chat({"X-Isthmus-Route": route})
    counted = [[entry["beside"][stage][2] for stage in ("prefill", "decode")] for entry in fresh.entries()]
    assert counted == [[entry["prompt_tokens"], 0] for entry in fresh.entries()]


def test_the_same_is_learned_from_a_stored_ledger(fresh):
    for route in ("split", "gpu", "cpu"):
        fresh.chat({"X-Isthmus-Route": route})
    stored = fresh.http.get("/ledger").content
    again = Estimates()
    for entry in msgspec.json.decode(stored)["entries"]:
        again.learn(msgspec.convert(entry, Entry))
    assert again.view() == fresh.gateway.dispatcher.planner.estimates.view()
    assert again.view()["codecs"]["raw"]["ratio"] == 0.5


def test_a_proxy_that_is_started_again_knows_what_it_knew(hf_dir, tmp_path):
    cluster = make_cluster(hf_dir, ledger_file=str(tmp_path / "ledger.sqlite"))
    with running(cluster) as stack:
        for route in ("split", "gpu", "cpu"):
            stack.chat({"X-Isthmus-Route": route})
        before = stack.gateway.dispatcher.planner.estimates.view()
    again = make_cluster(hf_dir, ledger_file=str(tmp_path / "ledger.sqlite"))
    with running(again) as stack:
        after = stack.gateway.dispatcher.planner.estimates.view()
        assert after["vllm"] == before["vllm"]
        assert after["codecs"] == before["codecs"]
        assert stack.chat().headers["x-isthmus-reason"] in ("min_e2e", "explores")


@pytest.mark.parametrize(("policy", "routes"), [("round_robin", ["gpu", "cpu", "gpu", "cpu"])])
def test_a_policy_from_the_file(hf_dir, policy, routes):
    with running(make_cluster(hf_dir, policy=policy)) as stack:
        answers = [stack.chat() for _ in routes]
        assert [answer.headers["x-isthmus-route"] for answer in answers] == routes
        assert {answer.headers["x-isthmus-reason"] for answer in answers} == {policy}
        # A forced route takes nobody's turn.
        stack.chat({"X-Isthmus-Route": "split"})
        assert stack.chat().headers["x-isthmus-route"] == "gpu"


def test_objectives_of_a_request_reach_the_decision(stack):
    stack.chat({"X-SLO-TTFT-Ms": "250", "X-SLO-TPOT-Ms": "50"})
    ask = stack.entries()[0]["decision"][0]
    assert 250_000_000 in ask
    assert 50_000_000 in ask


@pytest.mark.parametrize("name", ["X-SLO-TTFT-Ms", "X-SLO-TPOT-Ms"])
def test_a_wrong_objective_is_named(stack, name):
    answer = stack.chat({name: "soon"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name


def test_a_prompt_goes_where_it_fits(stack):
    """The worker has 300 cells, vLLM takes 200 tokens."""
    answer = stack.complete(prompt=[5] * 250, max_tokens=5)
    assert answer.headers["x-isthmus-route"] == "cpu"
    assert stack.complete({"X-Isthmus-Route": "gpu"}, prompt=[5] * 250, max_tokens=5).status_code == 400
    assert stack.complete(prompt=[5] * 300, max_tokens=5).status_code == 400


class TestFullWorkers:
    """Link deadline of 2 s."""

    def test_at_the_deadline_vllm_takes_over(self, stack):
        stack.worker.script.refuse_reserve = FULL
        began_s = time.monotonic()
        answer = stack.chat()
        assert answer.status_code == 200
        assert (answer.headers["x-isthmus-route"], answer.headers["x-isthmus-reason"]) == ("gpu", "worker_full")
        assert time.monotonic() - began_s >= 1.9
        (entry,) = stack.entries()
        assert entry["reserve_ns"] > 1.8e9
        assert (entry["worker"], entry["codec"], entry["failed_over"]) == (None, None, None)

    def test_sooner_where_vllm_is_sooner(self, fresh):
        for route in ("split", "gpu"):
            fresh.chat({"X-Isthmus-Route": route})
        # Slower than split by a little.
        for _ in range(10):
            fresh.gateway.dispatcher.planner.estimates.vllm("some").step.observe(5_000_000, 1, 1, 20)
        fresh.worker.script.refuse_reserve = FULL
        began_s = time.monotonic()
        assert fresh.chat(max_tokens=3).headers["x-isthmus-route"] == "gpu"
        assert time.monotonic() - began_s < 1.5

    def test_a_forced_route_waits_and_fails(self, stack):
        stack.worker.script.refuse_reserve = FULL
        assert stack.chat({"X-Isthmus-Route": "split"}).status_code == 503
        assert len(stack.worker.heard(Reserve)) > 5

    def test_a_wait_that_the_worker_announces_is_waited(self, stack):
        stack.worker.script.queue_ms = 200
        timer = threading.Timer(0.3, lambda: setattr(stack.worker.script, "queue_ms", None))
        timer.start()
        answer = stack.chat(isthmus=True)
        timer.join()
        assert answer.json()["isthmus"]["route"] == "split"
        assert answer.json()["isthmus"]["reserve_ns"] > 0.25e9
        assert len(stack.worker.heard(Reserve)) == 1

    def test_a_wait_that_is_too_long_is_not(self, stack):
        stack.worker.script.queue_ms = 60_000
        began_s = time.monotonic()
        answer = stack.chat()
        assert (answer.headers["x-isthmus-route"], answer.headers["x-isthmus-reason"]) == ("gpu", "worker_full")
        assert time.monotonic() - began_s >= 1.9
        wait_until(lambda: not stack.worker.open)


@pytest.fixture
def hanging(stack: Stack) -> Iterator[Stack]:
    stack.prefill.script.hang = True
    yield stack
    stack.prefill.script.hang = False


def test_the_deadline_is_the_requests_not_the_attempts(hanging):
    """2 s of vLLM, and what is left goes to nobody who would make it wait as long again."""
    began_s = time.monotonic()
    hanging.chat()
    assert time.monotonic() - began_s < 3.5


def test_as_many_are_expected_as_there_were_lately_unless_nobody_else_is_there(fresh):
    planner = fresh.gateway.dispatcher.planner
    fresh.chat()
    planner._lately.extend([5.0] * 8)
    with planner.serving():
        fresh.chat()
    fresh.chat()
    assert [entry["decision"][0][-1] for entry in fresh.entries()] == [0, 3, 0]


def test_expected_lengths():
    answers = AnswerLengths()
    assert answers.expected(None, 1000) == 128
    assert answers.expected(64, 64) == 64
    for _ in range(50):
        answers.observe(1000, 300)
        answers.observe(None, 40)
    assert answers.expected(1000, 1000) == 300
    assert answers.expected(1000, 200) == 200
    assert answers.expected(64, 64) == 64
    assert answers.expected(None, 4000) == 40


def status(**changes: object) -> Status:
    fields: dict[str, object] = {
        "worker": "w",
        "used_cells": 0,
        "num_cells": 1,
        "running_sequences": 0,
        "reserved_sequences": 0,
        "max_sequences": 1,
        "landing_bytes": 0,
        "prefill_tokens_per_s": 250.0,
        "prefill_basis": "measured",
    }
    return Status(**fields | changes)  # type: ignore[arg-type]


def test_a_workers_own_numbers_serve_until_requests_have_shown_better():
    estimates = Estimates()
    assert estimates.worker_prefill("w", None) is None
    assert estimates.worker_prefill("w", status()).at(500, 1, 0) == 2 * 10**9
    assert estimates.worker_step("w", status(), alone=True) is None
    said = status(step_ns=20_000_000, step_sequences=2.0, step_context_tokens=500.0)
    assert estimates.worker_step("w", said, alone=False) is None
    assert estimates.worker_step("w", said, alone=True).at(1, 2, 500) == 20_000_000
    # Said again it is no news, and another worker is taken to be like this one.
    assert estimates.worker_step("w", said, alone=True).samples == 1
    assert estimates.worker_step("v", None, alone=True) == Cost((2e7, 0, 0), 1, "another worker")
    # A worker that guesses makes more than a token a step.
    guessing = status(step_ns=1, step_sequences=1.0, drafted_tokens=5)
    assert estimates.worker_step("u", guessing, alone=True).basis == "another worker"
