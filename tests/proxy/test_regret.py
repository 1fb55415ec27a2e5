"""What a decision cost against the best route that is known for the very same request."""

from __future__ import annotations

from typing import Any

import msgspec

from proxy import regret
from proxy.ledger import Account, Entry
from proxy.regret import Regret, Regrets

PROMPT = [1, 2, 3]


def entry(seq: int, route: str, total_ns: int, reason: str = "forced", **changes: Any) -> Entry:
    fields = {"seq": seq, "route": route, "reason": reason, "total_ns": total_ns, "prompt_tokens": 100}
    return msgspec.structs.replace(Account("r", "m").close("ok"), **fields | changes)


def test_a_choice_is_judged_once_when_another_route_is_known():
    regrets = Regrets()
    assert regrets.learn(entry(1, "split", 300, "min_e2e"), PROMPT) is None
    # Queueing and tokenizing are nobody's choice.
    assert regrets.learn(entry(2, "gpu", 260, queue_ns=30, tokenize_ns=20, route_ns=10), PROMPT) == Regret(1, 100, 200)
    assert regrets.learn(entry(3, "cpu", 100), PROMPT) is None
    assert regrets.learn(entry(4, "gpu", 200, "min_e2e"), PROMPT) == Regret(4, 100, 100)
    assert regrets.learn(entry(5, "cpu", 100, "min_e2e"), PROMPT) == Regret(5, 0, 100)


def test_only_the_same_request_counts():
    regrets = Regrets()
    regrets.learn(entry(1, "split", 300, "min_e2e"), PROMPT)
    assert regrets.learn(entry(2, "gpu", 100), [1, 2, 4]) is None
    assert regrets.learn(entry(3, "gpu", 100, completion_tokens=7), PROMPT) is None
    # Nothing was computed for it; it failed; it went on elsewhere.
    assert regrets.learn(entry(4, "gpu", 100, cached_tokens=90), PROMPT) is None
    assert regrets.learn(entry(5, "gpu", 100, status="cancelled"), PROMPT) is None
    assert regrets.learn(entry(6, "gpu", 100, failed_over="link_error"), PROMPT) is None
    assert regrets.learn(entry(7, "gpu", 100), PROMPT) == Regret(1, 200, 100)


def test_no_more_requests_are_remembered_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(regret, "MAX_REQUESTS", 1)
    regrets = Regrets()
    regrets.learn(entry(1, "split", 300, "min_e2e"), PROMPT)
    regrets.learn(entry(2, "split", 300, "min_e2e"), [9])
    assert regrets.learn(entry(3, "gpu", 100), PROMPT) is None
