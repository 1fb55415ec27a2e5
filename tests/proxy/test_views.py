"""What the proxy shows of itself over HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proxy.estimates import Estimates
from tests.proxy.conftest import Stack, make_cluster, running


@pytest.fixture
def asked(stack: Stack) -> Stack:
    for route in ("split", "gpu", "cpu", "gpu"):
        stack.chat({"X-Isthmus-Route": route, "X-Isthmus-Codec": "q8", "X-Request-Id": f"id-{route}"})
    return stack


def ids(stack: Stack, query: str) -> list[str]:
    return [entry["request_id"] for entry in stack.http.get(f"/ledger?{query}").json()["entries"]]


def test_the_ledger_is_chosen_from(asked):
    assert ids(asked, "last=3") == ["id-gpu", "id-cpu", "id-gpu"]
    assert ids(asked, "route=gpu") == ["id-gpu", "id-gpu"]
    assert ids(asked, "route=gpu&last=1&since=1") == ["id-gpu"]
    assert ids(asked, "codec=q8") == ["id-split"]
    assert ids(asked, "status=cancelled") == []
    assert ids(asked, "request_id=id-cpu") == ["id-cpu"]
    worker = asked.entries()[0]["worker"]
    assert ids(asked, f"worker={worker}") == ["id-split", "id-cpu"]
    assert ids(asked, "since=2") == ["id-cpu", "id-gpu"]
    assert asked.http.get("/ledger?since=-1").status_code == 400


def test_entries_are_numbered_and_dated(asked):
    entries = asked.entries()
    assert [entry["seq"] for entry in entries] == [1, 2, 3, 4]
    assert all(entry["closed_at"].startswith("20") and entry["closed_at"].endswith("+00:00") for entry in entries)


def test_lines_of_json(asked):
    by_header = asked.http.get("/ledger", headers={"Accept": "application/x-ndjson"})
    by_query = asked.http.get("/ledger?format=ndjson")
    assert by_header.headers["content-type"].startswith("application/x-ndjson")
    assert by_header.text == by_query.text
    assert [json.loads(line) for line in by_header.text.splitlines()] == asked.entries()
    assert asked.http.get("/ledger?format=json", headers={"Accept": "application/x-ndjson"}).json()["entries"]


def test_one_entry(asked):
    assert asked.http.get("/ledger/id-gpu").json() == asked.entries()[-1]
    missing = asked.http.get("/ledger/nobody")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "entry_not_found")


def test_nodes_say_what_is_known_of_them(stack):
    stack.gateway.dispatcher.planner.estimates = Estimates()
    assert stack.http.get("/nodes").json()["prefill"]["prefill_tokens_per_s"] is None
    stack.chat({"X-Isthmus-Route": "split"})
    view = stack.http.get("/nodes").json()
    assert view["prefill"]["state"] == "up"
    assert view["prefill"]["prefill_tokens_per_s"] > 0
    assert view["proxy"] == {"running": 0, "queued": 0}
    assert view["decode"]["state"] == "up"
    assert view["decode"]["distrusted"] == {}


def test_the_link_is_as_fast_as_its_last_transfer_was(stack):
    assert stack.http.get("/nodes").json()["link"]["goodput_bytes_per_s"] is None
    stack.worker.script.wire_ns = 1024
    stack.chat({"X-Isthmus-Route": "split"})
    # The fake worker says that 2,048 bytes came.
    assert stack.http.get("/nodes").json()["link"]["goodput_bytes_per_s"] == 2e9


def test_the_ledger_survives_the_proxy(hf_dir: Path, tmp_path: Path):
    cluster = make_cluster(hf_dir, ledger_file=str(tmp_path / "ledger.sqlite"), ledger_entries=2)
    with running(cluster) as first:
        for number in range(5):
            first.chat({"X-Request-Id": f"before-{number}"})
        assert ids(first, "last=2") == ["before-3", "before-4"]
        kept = first.entries()
        assert [entry["seq"] for entry in kept] == [1, 2, 3, 4, 5]
    with running(cluster) as second:
        assert second.entries() == kept
        second.chat({"X-Request-Id": "after"})
        assert [entry["seq"] for entry in second.entries()] == [1, 2, 3, 4, 5, 6]
        assert second.http.get("/ledger/before-1").json() == kept[1]
        lines = second.http.get("/ledger?format=ndjson&last=4").text.splitlines()
        assert [json.loads(line)["seq"] for line in lines] == [3, 4, 5, 6]
        assert "isthmus_ledger_unwritten 0.0" in second.http.get("/metrics").text
