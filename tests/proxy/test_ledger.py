"""The ledger and the metrics after requests by every route."""

from __future__ import annotations

from proxy.costs import Estimate
from proxy.ledger import Account, Ledger
from tests.proxy.conftest import Stack
from transfer.stages import DecodeReport


def entry_after(stack: Stack, route: str) -> dict:
    stack.chat({"X-Isthmus-Route": route, "X-Isthmus-Codec": "q8", "X-Request-Id": f"id-{route}"})
    return stack.entries()[-1]


def test_split(stack):
    entry = entry_after(stack, "split")
    assert entry["route"] == "split"
    assert entry["reason"] == "forced"
    assert entry["codec"] == "q8"
    assert entry["status"] == "ok"
    assert entry["completion_tokens"] == 3
    assert (entry["kv_raw_bytes"], entry["kv_wire_bytes"]) == (4096, 2048)
    assert (entry["transfer_exposed_ns"], entry["landing_tail_ns"]) == (1_000_000, 400_000)
    assert entry["prefill_ns"] > 0
    assert entry["reserve_ns"] > 0
    assert 0 < entry["ttft_ns"] <= entry["total_ns"]
    assert entry["prefill_alternative_ns"] == round(entry["prompt_tokens"] / 400 * 1e9)
    assert entry["prefill_alternative_basis"] == "a fake measurement"
    assert (
        entry["specialization_gain_ns"]
        == entry["prefill_alternative_ns"] - entry["prefill_ns"] - entry["transfer_exposed_ns"]
    )


def test_cpu(stack):
    entry = entry_after(stack, "cpu")
    assert entry["codec"] is None
    assert entry["prefill_ns"] == 5_000_000
    assert entry["decode_ns"] == 3_000_000
    assert entry["kv_wire_bytes"] == 0
    assert entry["specialization_gain_ns"] is None


def test_gpu(stack):
    entry = entry_after(stack, "gpu")
    assert entry["prefill_ns"] > 0
    assert entry["reserve_ns"] == 0
    assert entry["specialization_gain_ns"] is None


def test_what_reuse_saved_and_guesses_brought():
    account = Account("a", "model")
    account.prompt, account.route, account.alternative = [1] * 100, "cpu", Estimate(1000, "made up")
    account.report = DecodeReport(
        prompt_tokens=100,
        completion_tokens=9,
        kv_reused_tokens=40,
        restored_tokens=20,
        restore_ns=7,
        preemptions=1,
        drafted_tokens=5,
        accepted_tokens=3,
    )
    entry = account.close("ok")
    assert entry.reuse_saved_ns == 400 - 7
    assert (entry.kv_restored_tokens, entry.preemptions) == (20, 1)
    assert (entry.drafted_tokens, entry.accepted_tokens) == (5, 3)


def test_the_client_can_ask_for_its_entry(stack):
    answer = stack.chat(isthmus=True).json()
    assert answer["isthmus"] == stack.entries()[-1]
    assert "isthmus" not in stack.chat().json()


def test_newest_last_and_no_more_than_asked(stack):
    for name in ("a", "b", "c"):
        stack.chat({"X-Request-Id": name})
    assert [entry["request_id"] for entry in stack.http.get("/ledger?last=2").json()["entries"]] == ["b", "c"]


def test_the_oldest_is_forgotten():
    ledger = Ledger(2)
    for name in ("a", "b", "c"):
        ledger.add(Account(name, "m").close("ok"))
    assert [entry.request_id for entry in ledger.last(10)] == ["b", "c"]


def test_gaps_and_first_text():
    account = Account("a", "m")
    assert account.close("ok").ttft_ns is None
    assert account.saw_text() is None
    assert account.saw_text() >= 0
    assert account.close("ok").ttft_ns > 0


def test_metrics(stack):
    def value(line: str) -> float:
        rows = [row for row in stack.http.get("/metrics").text.splitlines() if row.startswith(line + " ")]
        return float(rows[0].split()[-1]) if rows else 0.0

    lines = (
        'isthmus_route_total{reason="forced",route="split"}',
        'isthmus_kv_transfer_bytes_total{kind="raw"}',
        'isthmus_kv_transfer_bytes_total{kind="wire"}',
        'isthmus_requests_total{status="ok"}',
        'isthmus_requests_total{status="invalid_request"}',
        'isthmus_time_to_first_token_seconds_count{route="split"}',
        'isthmus_inter_token_latency_seconds_count{route="split"}',
        "isthmus_kv_transfer_seconds_count",
        "isthmus_specialization_gain_seconds_count",
    )
    before = [value(line) for line in lines]
    stack.chat({"X-Isthmus-Route": "split"})
    stack.chat(n=0)
    grown = [value(line) - old for line, old in zip(lines, before, strict=True)]
    assert grown == [1, 4096, 2048, 1, 1, 1, 2, 1, 1]
    assert value("isthmus_prefill_up") == value("isthmus_decode_up") == 1


def test_nodes(stack):
    view = stack.http.get("/nodes").json()
    assert view["prefill"]["up"]
    assert view["decode"]["welcome"]["num_cells"] == 1000
    assert view["decode"]["status"]["worker"] == "fake"


def test_timings_as_llama_server_says_them(stack):
    timings = stack.chat(timings_per_token=True).json()["timings"]
    assert timings["predicted_n"] == 3
    assert timings["predicted_ms"] == 3.0
    assert timings["predicted_per_second"] == 1000.0
    assert timings["prompt_n"] == stack.entries()[0]["prompt_tokens"]
    assert timings["prompt_ms"] > 0
    assert "timings" not in stack.chat().json()
    last = [event for event in stack.chat(timings_per_token=True, stream=True).text.split("\n\n") if event][-2]
    assert '"timings"' in last


def test_live_and_ready(stack):
    assert stack.http.get("/health/live").json() == stack.http.get("/health/ready").json() == {"status": "ok"}
