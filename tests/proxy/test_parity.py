"""The parity guard, with a worker that predicts what a test wants; `tests/e2e/test_parity.py` has the engines."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy import decode_node, parity, probation
from proxy.ledger import Ledger
from proxy.parity import FIRST_CHECKS, Record
from proxy.prefill_node import PrefillNode
from proxy.prefill_pool import PrefillPool
from proxy.probation import GOOD_TO_RETURN, Probations
from proxy.witness import TOP
from tests.proxy.conftest import Stack, make_cluster, running, wait_until
from tests.proxy.fake_prefill import PrefillScript
from tests.proxy.fake_worker import Script
from transfer.messages import Abort, Reserve

LIKELY = tuple((token, math.log(0.5 / 2**token)) for token in range(TOP))
# The same probabilities for other tokens.
UNLIKELY = tuple((token + 100, logprob) for token, logprob in LIKELY)
SPLIT = {"X-Isthmus-Route": "split"}


@pytest.fixture(scope="module")
def own_stack(hf_dir: Path) -> Iterator[Stack]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "QUIET_S", 0.1)
        patch.setattr(decode_node, "HEARTBEAT_S", 0.05)
        with running(make_cluster(hf_dir, parity_share=1.0)) as stack:
            yield stack


@pytest.fixture
def guarded(own_stack: Stack) -> Iterator[Stack]:
    """A proxy that looks at every split request and has found nothing yet."""
    own_stack.worker.script, own_stack.prefill.script = Script(), PrefillScript()
    own_stack.worker.said.clear()
    own_stack.gateway.ledger = Ledger(100)
    own_stack.gateway.parity._records.clear()
    own_stack.gateway.parity._probations = Probations()
    for node in own_stack.gateway.workers:
        node.distrusted, node.kv_era = {}, 0
    yield own_stack
    own_stack.assert_idle()


def compared(stack: Stack, **headers: str) -> dict[str, Any]:
    """Ask by route split and wait until the guard has looked; returns the ledger's entry."""
    assert stack.chat(SPLIT | headers).status_code == 200
    wait_until(lambda: stack.entries()[-1]["parity_kl"] is not None)
    return stack.entries()[-1]


@contextmanager
def busy(stack: Stack) -> Iterator[None]:
    """A request runs during the body."""
    stack.prefill.script.endless = True
    body = {"model": "tiny", "prompt": "hi", "stream": True}
    with stack.http.stream("POST", "/v1/completions", json=body, headers={"X-Isthmus-Route": "gpu"}) as response:
        lines = response.iter_lines()
        next(lines)
        yield
    stack.prefill.script.endless = False


def reserves(stack: Stack) -> list[Reserve]:
    return [message for message in stack.worker.heard(Reserve) if isinstance(message, Reserve)]


def test_equal_predictions_are_no_alarm(guarded):
    guarded.worker.script.predicts = {"kv": LIKELY, "local": LIKELY}
    assert compared(guarded)["parity_kl"] == pytest.approx(0, abs=1e-9)
    by_wire, own = reserves(guarded)
    assert (by_wire.source, by_wire.reuse, by_wire.sampling.logprobs) == ("kv", True, TOP)
    assert (own.source, own.reuse, own.sampling.logprobs, own.sampling.max_tokens) == ("local", False, TOP, 1)
    # vLLM's first token is part of what the worker predicted after.
    assert own.prompt == [*by_wire.prompt, 42]
    assert guarded.http.get("/health").json()["status"] == "ok"
    assert 'isthmus_parity_kl_nats_count{codec="raw"} 1.0' in guarded.http.get("/metrics").text


def test_clients_see_what_they_asked_for(guarded):
    guarded.worker.script.predicts = {"kv": LIKELY, "local": LIKELY}
    plain = guarded.chat(SPLIT).json()["choices"][0]
    assert plain.get("logprobs") is None
    wanted = guarded.chat(SPLIT, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in wanted] == [2, 2, 2]
    wait_until(lambda: all(entry["parity_kl"] is not None for entry in guarded.entries()))


def test_wrong_kv_by_a_codec_switches_it_off_and_then_the_route(guarded):
    q8 = {"X-Isthmus-Codec": "q8"}
    guarded.worker.script.predicts = {"kv": LIKELY, "local": LIKELY}
    compared(guarded)
    guarded.worker.script.predicts = {"kv": UNLIKELY, "local": LIKELY}
    assert compared(guarded, **q8)["parity_kl"] > 1
    assert guarded.http.get("/health").json()["status"] == "ok"
    compared(guarded, **q8)
    wait_until(lambda: guarded.gateway.parity.alarms)
    health = guarded.http.get("/health")
    assert health.status_code == 200
    assert health.json()["status"] == "degraded"
    assert "q8 to " in health.json()["alarms"][0]
    refused = guarded.chat(SPLIT | q8)
    assert refused.status_code == 400
    assert "q8 is switched off: KV changes the next token's distribution" in refused.json()["error"]["message"]
    # raw is what the cells hold: where it is wrong, all is.
    for _ in range(2):
        assert compared(guarded)["codec"] == "raw"
    wait_until(lambda: not next(iter(guarded.gateway.workers)).codecs)
    assert "isthmus_parity_alarms 2.0" in guarded.http.get("/metrics").text
    assert guarded.chat().headers["X-Isthmus-Route"] != "split"
    assert guarded.chat(SPLIT).status_code == 503
    # Nor is anything reused of what it has kept.
    assert guarded.chat({"X-Isthmus-Route": "cpu"}).status_code == 200
    assert not reserves(guarded)[-1].reuse


def switched_off(stack: Stack, codec: str) -> None:
    """Two comparisons have shown ``codec`` to be wrong, and it still is."""
    stack.worker.script.predicts = {"kv": UNLIKELY, "local": LIKELY}
    for _ in range(2):
        compared(stack, **{"X-Isthmus-Codec": codec})
    wait_until(lambda: stack.gateway.parity.alarms)


def trials(stack: Stack) -> list[Reserve]:
    return [reserve for reserve in reserves(stack) if reserve.request_id.startswith("probe-")]


def tried(stack: Stack) -> Reserve:
    """A request is served by another route, and then the codec is tried with its prompt."""
    count = len(trials(stack))
    assert stack.chat({"X-Isthmus-Route": "cpu"}).status_code == 200
    wait_until(lambda: len(trials(stack)) > count and not stack.gateway.parity._waiting)
    return trials(stack)[-1]


def test_a_codec_that_stays_wrong_stays_off(guarded, monkeypatch):
    switched_off(guarded, "q8")
    (waits,) = guarded.http.get("/health").json()["probations"]
    assert (waits["codec"], waits["good"]) == ("q8", 0)
    assert 0 < waits["next_try_s"] <= probation.FIRST_PAUSE_S
    # Before that nothing is tried.
    assert guarded.chat({"X-Isthmus-Route": "cpu"}).status_code == 200
    assert not guarded.gateway.parity._waiting
    for pauses in (2, 4):
        monkeypatch.setattr(guarded.gateway.parity._probations._by_way[(waits["worker"], "q8")], "next_ns", 0)
        trial = tried(guarded)
        assert (trial.codec, trial.source, trial.reuse, trial.tenant) == ("q8", "kv", False, trial.request_id)
        (waits,) = guarded.http.get("/health").json()["probations"]
        assert waits["next_try_s"] == pytest.approx(pauses * probation.FIRST_PAUSE_S, abs=15)
    assert guarded.http.get("/health").json()["status"] == "degraded"
    assert guarded.chat(SPLIT | {"X-Isthmus-Codec": "q8"}).status_code == 400
    # The client's own request was answered as it would have been, and its entry says nothing of the trial.
    assert guarded.entries()[-1]["parity_kl"] is None


@pytest.mark.parametrize("codec", ["q8", "raw"])
def test_a_codec_that_is_right_again_comes_back(guarded, monkeypatch, codec):
    monkeypatch.setattr(probation, "FIRST_PAUSE_S", 0.0)
    switched_off(guarded, codec)
    tried(guarded)
    assert guarded.gateway.parity.alarms
    guarded.worker.script.predicts = {"kv": LIKELY, "local": LIKELY}
    tries = 0
    while guarded.gateway.parity.probations():
        prompt = tried(guarded).prompt
        assert prompt == reserves(guarded)[-1].prompt
        tries += 1
    assert tries >= GOOD_TO_RETURN
    assert guarded.http.get("/health").json().keys().isdisjoint({"alarms", "probations"})
    (node,) = guarded.gateway.workers
    assert node.distrusted == {}
    # What the worker has kept of wrong KV is found by nobody.
    compared(guarded, **{"X-Isthmus-Codec": codec})
    tenants = [each.tenant for each in reserves(guarded) if not each.request_id.startswith(("probe-", "parity-"))]
    assert tenants[-1] == "/1"
    assert set(tenants[:-1]) == {""}


def test_a_codec_is_tried_over_all_prefill_nodes_that_answer_and_the_worst_counts(guarded, monkeypatch):
    nodes = [PrefillNode(f"gpu:{number}", "tiny", 1) for number in (1, 2, 3)]
    for node in nodes[:2]:
        node.up = True
    by_wire = {"gpu:1": LIKELY, "gpu:2": UNLIKELY}

    async def over(prefill, *_: object):
        return by_wire[prefill.name]

    async def own(*_: object):
        return LIKELY

    monkeypatch.setattr(parity, "prediction_by_wire", over)
    monkeypatch.setattr(parity, "own_prediction", own)
    guard, worker = guarded.gateway.parity, guarded.gateway.workers.pinned
    monkeypatch.setattr(guard, "_prefill", PrefillPool(nodes))
    trial = parity.Trial("w", "q8", [1, 2, 3], "")
    assert asyncio.run(guard._kl(trial, worker)) > 1
    by_wire["gpu:2"] = LIKELY
    assert asyncio.run(guard._kl(trial, worker)) < 0.01
    # A node that shows nothing leaves it open.
    by_wire["gpu:2"] = None
    assert asyncio.run(guard._kl(trial, worker)) is None


def test_a_try_gives_way_to_a_request_and_is_made_again(guarded, monkeypatch):
    monkeypatch.setattr(probation, "FIRST_PAUSE_S", 0.0)
    switched_off(guarded, "q8")
    guarded.worker.script.predicts = {"kv": LIKELY, "local": LIKELY}
    guarded.worker.script.silent_after_start = True
    guarded.chat({"X-Isthmus-Route": "gpu"})
    wait_until(lambda: trials(guarded))
    first = trials(guarded)[0].request_id
    with busy(guarded):
        wait_until(lambda: any(message.request_id == first for message in guarded.worker.heard(Abort)))
    guarded.worker.script.silent_after_start = False
    wait_until(lambda: guarded.gateway.parity.probations()[0]["good"] == 1)


def test_one_bad_comparison_is_chance(guarded):
    for kv in (LIKELY, UNLIKELY, LIKELY, LIKELY, UNLIKELY, LIKELY):
        guarded.worker.script.predicts = {"kv": kv, "local": LIKELY}
        compared(guarded)
    assert not guarded.gateway.parity.alarms


def test_whoever_computes_comes_first(guarded):
    guarded.worker.script.predicts = {"kv": LIKELY, "local": LIKELY}
    with busy(guarded):
        guarded.chat(SPLIT)
        time.sleep(0.5)
        assert guarded.entries()[-1]["parity_kl"] is None
    wait_until(lambda: any(entry["parity_kl"] is not None for entry in guarded.entries()))


def test_a_comparison_is_given_up_when_a_request_comes(guarded):
    guarded.worker.script.predicts = {"kv": LIKELY, "local": LIKELY}
    guarded.chat(SPLIT)
    guarded.worker.script.silent_after_start = True
    wait_until(lambda: any(reserve.request_id.startswith("parity-") for reserve in reserves(guarded)))
    own = next(reserve for reserve in reserves(guarded) if reserve.request_id.startswith("parity-"))
    with busy(guarded):
        wait_until(lambda: any(message.request_id == own.request_id for message in guarded.worker.heard(Abort)))
    guarded.worker.script.silent_after_start = False
    wait_until(lambda: guarded.entries()[0]["parity_kl"] is not None)


def test_a_worker_that_reuses_kv_all_the_same_proves_nothing(guarded):
    guarded.worker.script.predicts = {"kv": UNLIKELY, "local": LIKELY}
    guarded.chat(SPLIT)
    guarded.worker.script.reused_tokens = 3
    wait_until(lambda: not guarded.gateway.parity._waiting)
    assert guarded.entries()[-1]["parity_kl"] is None


def test_routes_without_kv_from_the_wire_are_not_looked_at(guarded):
    for route in ("gpu", "cpu"):
        guarded.chat({"X-Isthmus-Route": route})
    assert not guarded.gateway.parity._waiting
    assert all(reserve.sampling.logprobs is None for reserve in reserves(guarded))


def test_a_share_of_requests_is_looked_at_and_all_where_there_is_doubt():
    record = Record()
    for _ in range(FIRST_CHECKS):
        assert record.wants_more(0.25, 0.1)
        record.learn(0.01)
    assert [record.wants_more(0.25, 0.1) for _ in range(8)] == [False, False, False, True] * 2
    record.learn(0.5)
    assert all(record.wants_more(0.25, 0.1) for _ in range(3))
    assert not record.is_bad(0.1)
    record.learn(0.01)
    assert not record.wants_more(0.25, 0.1)
    record.learn(0.5)
    assert record.is_bad(0.1)
