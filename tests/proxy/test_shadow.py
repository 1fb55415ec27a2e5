"""Requests that are run again on another route: when, how, and what the ledger says of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from proxy import shadow
from proxy.shadow import _is_sampled
from tests.proxy.conftest import SplitIsBest, Stack, make_cluster, running, wait_until
from transfer.messages import Abort, Reserve


@pytest.fixture
def shadowed(hf_dir, monkeypatch) -> Iterator[Stack]:
    monkeypatch.setattr(shadow, "QUIET_S", 0.1)
    monkeypatch.setattr(shadow, "POLL_S", 0.02)
    with running(make_cluster(hf_dir, shadow_share=1.0)) as stack:
        stack.gateway.dispatcher.planner.estimates = SplitIsBest()
        yield stack


def metric(stack: Stack, line: str) -> float:
    rows = [row for row in stack.http.get("/metrics").text.splitlines() if row.startswith(line + " ")]
    return float(rows[0].split()[-1]) if rows else 0.0


def test_the_truth_about_the_alternative_is_found_out(shadowed):
    answer = shadowed.chat(isthmus=True).json()
    wait_until(lambda: len(shadowed.entries()) == 2)
    first, again = shadowed.entries()
    assert answer["isthmus"]["route"] == first["route"] == "split"
    assert (again["shadow_of"], again["reason"], again["status"]) == (first["request_id"], "shadow", "ok")
    assert again["route"] in ("gpu", "cpu")
    assert again["completion_tokens"] == first["completion_tokens"]
    assert again["predicted"] == first["predicted"]
    assert again["e2e_error"] is not None
    # Known once the shadow has run.
    assert first["regret_ns"] >= 0
    assert metric(shadowed, "isthmus_regret_ratio_count") == 1
    assert metric(shadowed, 'isthmus_shadows_total{status="ok"}') == 1
    # Nobody asked for it: it is in no client's numbers.
    assert metric(shadowed, 'isthmus_requests_total{status="ok"}') == 1
    assert metric(shadowed, f'isthmus_time_to_first_token_seconds_count{{route="{again["route"]}"}}') == 0
    shadowed.assert_idle()


def test_a_shadow_shares_nothing_and_makes_as_many_tokens(shadowed):
    for route in ("gpu", "cpu"):
        shadowed.prefill.bodies.clear()
        shadowed.worker.said.clear()
        # Which alternative it is depends on the prompt's length.
        shadowed.complete(prompt="hi" if route == "gpu" else "ho!", max_tokens=90, stop="x")
        wait_until(lambda: not shadowed.gateway.shadows.running and len(shadowed.entries()) % 2 == 0)
        entry = shadowed.entries()[-1]
        if entry["route"] == "gpu":
            body = shadowed.prefill.bodies[-1]
            assert (body["max_tokens"], body["ignore_eos"], body["stop"]) == (3, True, [])
            assert body["cache_salt"].startswith("shadow of")
        else:
            reserve = shadowed.worker.heard(Reserve)[-1]
            assert (reserve.reuse, reserve.source) == (False, "local")
            assert (reserve.sampling.max_tokens, reserve.sampling.ignore_eos) == (3, True)
    assert {entry["route"] for entry in shadowed.entries() if entry["shadow_of"]} == {"gpu", "cpu"}


def test_a_real_request_ends_it(shadowed, monkeypatch):
    monkeypatch.setattr(shadow, "QUIET_S", 60)
    shadowed.complete(prompt="ho!")
    shadowed.worker.script.silent_after_start = shadowed.prefill.script.endless = True
    monkeypatch.setattr(shadow, "QUIET_S", 0.1)
    wait_until(lambda: shadowed.gateway.shadows.running)
    wait_until(lambda: shadowed.worker.open or shadowed.prefill.open)
    with ThreadPoolExecutor(1) as pool:
        real = pool.submit(shadowed.complete, {"X-Isthmus-Route": "gpu"})
        # Not before: the shadow would come to its own end.
        wait_until(lambda: any(entry["shadow_of"] for entry in shadowed.entries()))
        shadowed.worker.script.silent_after_start = shadowed.prefill.script.endless = False
        assert real.result().status_code == 200
    statuses = {entry["request_id"]: entry["status"] for entry in shadowed.entries()}
    assert next(status for name, status in statuses.items() if name.endswith("-shadow")) == "cancelled"
    shadowed.gateway.shadows._share = 0.0
    wait_until(lambda: not shadowed.gateway.shadows.running)


def test_none_runs_beside_a_request(shadowed):
    shadowed.worker.script.endless = True
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 150, "stream": True}
    with shadowed.http.stream("POST", "/v1/completions", json=body, headers={"X-Isthmus-Route": "cpu"}) as response:
        lines = response.iter_lines()
        next(lines)
        shadowed.worker.script.endless = False
        assert shadowed.complete().status_code == 200
        threading.Event().wait(0.4)
        assert not shadowed.gateway.shadows.running
    wait_until(lambda: shadowed.worker.heard(Abort))
    wait_until(lambda: any(entry["shadow_of"] for entry in shadowed.entries()))


def test_forced_requests_have_none(shadowed):
    shadowed.complete({"X-Isthmus-Route": "split"})
    threading.Event().wait(0.4)
    assert len(shadowed.entries()) == 1


def test_the_sample_is_the_same_every_time_and_of_the_right_size():
    names = [f"request {number}" for number in range(2000)]
    sampled = [name for name in names if _is_sampled(name, 0.25)]
    assert sampled == [name for name in names if _is_sampled(name, 0.25)]
    assert len(sampled) == pytest.approx(500, abs=80)
    assert all(_is_sampled(name, 1.0) for name in names)
    assert not any(_is_sampled(name, 0.0) for name in names)
