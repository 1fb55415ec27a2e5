from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from isthmus.cli import cli
from measurements import ledger, ledger_entries, ledger_spans
from measurements.ledger_entries import Spent
from proxy.ledger import Account, Entry, Ledger
from proxy.store import Store
from transfer.errors import ConfigError, LinkError

MS = 1_000_000


def entry(request_id: str = "r", **changes: object) -> dict:
    """A split request of the proxy's own kind: 100 ms of prefill, 10 exposed, 200 of decoding."""
    closed: Entry = Account(request_id, "m").close("ok")
    made = msgspec.structs.replace(
        closed,
        route="split",
        codec="q8",
        prompt_tokens=64,
        queue_ns=5 * MS,
        tokenize_ns=5 * MS,
        prefill_ns=100 * MS,
        transfer_exposed_ns=10 * MS,
        first_decode_ns=4 * MS,
        decode_ns=200 * MS,
        wire_ns=60 * MS,
        encode_ns=20 * MS,
        inject_ns=8 * MS,
        kv_raw_bytes=4 << 20,
        kv_wire_bytes=2 << 20,
        ttft_ns=110 * MS,
        total_ns=330 * MS,
        prefill_alternative_ns=400 * MS,
        specialization_gain_ns=290 * MS,
    )
    return msgspec.to_builtins(msgspec.structs.replace(made, **changes))


def save(path: Path, *entries: dict) -> Path:
    path.write_text(json.dumps({"entries": entries}))
    return path


def spent(**changes: object) -> Spent:
    return msgspec.convert(entry(**changes), Spent)


def cpu(prefill_ms: int, **changes: object) -> Spent:
    about = {"route": "cpu", "codec": None, "prefill_ns": prefill_ms * MS, "specialization_gain_ns": None}
    return spent(**(about | changes))


def test_every_form_of_file_is_read(tmp_path: Path) -> None:
    both = [entry("a"), entry("b")]
    forms = {
        "answer.json": json.dumps({"entries": both}),
        "list.json": json.dumps(both),
        "lines.ndjson": "\n".join(map(json.dumps, both)) + "\n\n",
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        assert [each.request_id for each in ledger_entries.read(str(tmp_path / name))] == ["a", "b"]
    (tmp_path / "one.json").write_text(json.dumps(both[0]))
    assert len(ledger_entries.read(str(tmp_path / "one.json"))) == 1


def test_a_proxys_own_file_is_read_while_it_writes(tmp_path: Path) -> None:
    file = tmp_path / "ledger.sqlite"
    with closing(Store(file, 1000)) as store:
        kept = Ledger(2, store)
        for name in ("a", "b", "c"):
            kept.add(Account(name, "m").close("ok"))
        assert store.flush(10)
        assert [each.request_id for each in ledger_entries.read(str(file))] == ["a", "b", "c"]
    assert len(ledger_entries.read(str(file))) == 3
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"damaged\.sqlite is no ledger of a proxy's"):
        ledger_entries.read(str(damaged))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1 is not JSON"),
        ('{"entries": []}', "holds no entries"),
        ('{"entries": 3}', "is no list"),
        ('[{"request_id": "a"}]', "entry 1 is none of the ledger's: .*status"),
        (json.dumps([entry(), entry() | {"wire_ns": -1}]), r"entry 2 .*wire_ns"),
        (json.dumps([entry() | {"wire_ns": float("nan")}]), "line 1 is not JSON"),
    ],
    ids=["cut off", "empty", "no list", "no entry", "negative", "NaN"],
)
def test_what_is_no_ledger_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=said):
        ledger_entries.read(str(tmp_path / "x.json"))
    with pytest.raises(ConfigError, match="cannot read"):
        ledger_entries.read(str(tmp_path / "none.json"))


def test_a_proxy_that_does_not_answer() -> None:
    with pytest.raises(LinkError, match=r"http://127\.0\.0\.1:1 does not give its ledger"):
        ledger_entries.read("http://127.0.0.1:1/ledger")


def test_failures_are_counted_and_left_out_of_medians() -> None:
    found = ledger.summarize(
        [
            spent(),
            spent(prefill_ns=300 * MS),
            spent(prefill_ns=9000 * MS, status="cancelled"),
            spent(prefill_ns=9000 * MS, failed_over="link_error"),
        ]
    )
    row = found["ways"]["split q8"]
    assert (row["requests"], row["counted"], row["not_ok"], row["failed_over"]) == (4, 2, 1, 1)
    assert row["prefill_ns"] == {"p50": 200 * MS, "p90": 280 * MS}
    assert (row["kv_raw_bytes"], row["kv_wire_bytes"]) == (16 << 20, 8 << 20)


def test_gains_and_losses_are_summed_apart() -> None:
    found = ledger.summarize(
        [spent(), spent(specialization_gain_ns=-90 * MS), cpu(50), spent(specialization_gain_ns=10 * MS)]
    )
    assert (found["gained_s"], found["lost_s"], found["net_gain_s"]) == pytest.approx((0.3, 0.09, 0.21))
    assert (found["split_requests_with_gain"], found["split_requests_with_loss"]) == (2, 1)
    assert "gained 0.30 s in 2 requests and lost 0.09 s in 1" in ledger.sentences(found)[0]


def test_the_estimate_is_judged_where_the_cpu_did_prefill() -> None:
    assert ledger.summarize([spent()])["estimate_error"] is None
    found = ledger.summarize([spent(), cpu(500), cpu(320), cpu(1, kv_reused_tokens=60), cpu(1, status="cancelled")])
    assert found["estimate_error"] == pytest.approx({"median": 0.025, "median_absolute": 0.225, "n": 2})
    assert "off by +3%" in ledger.sentences(found)[1]


def test_spans_follow_in_turn_and_the_wire_ends_when_the_kv_is_there() -> None:
    found = {span.stage: span for span in ledger_spans.spans(spent())}
    assert list(found) == ["queue", "tokenize", "prefill", "transfer_exposed", "decode", "wire", "encode", "inject"]
    assert found["prefill"].begin_ns == 10 * MS
    assert found["decode"].begin_ns == 120 * MS
    assert (found["wire"].begin_ns, found["encode"].begin_ns) == (60 * MS, 60 * MS)
    assert found["inject"].begin_ns + found["inject"].length_ns == 120 * MS


def test_a_wire_that_was_busy_before_the_request_could_be_starts_with_it() -> None:
    found = {span.stage: span for span in ledger_spans.spans(spent(wire_ns=900 * MS))}
    assert found["wire"].begin_ns == 0


def test_the_request_whose_waterfall_is_shown() -> None:
    entries = [spent(request_id="a"), spent(request_id="b"), spent(request_id="c", status="cancelled")]
    assert ledger_entries.choose(entries, None).request_id == "b"
    assert ledger_entries.choose(entries, "c").request_id == "c"
    with pytest.raises(ConfigError, match="no entry of request 'd'"):
        ledger_entries.choose(entries, "d")
    with pytest.raises(ConfigError, match="no request was answered"):
        ledger_entries.choose(entries[2:], None)


def test_everything_that_can_be_asked_for(tmp_path: Path) -> None:
    no_route = entry("x", route=None, codec=None, status="invalid_request", prefill_ns=0)
    gpu = entry("g", route="gpu", codec=None, specialization_gain_ns=None)
    path = save(tmp_path / "ledger.json", entry("s"), gpu, no_route)
    files = ["--json", "out.json", "--plot", "out.svg", "--trace", "trace.json"]
    arguments = [str(tmp_path / each) if "." in each else each for each in files]
    result = CliRunner().invoke(cli, ["measure", "ledger", str(path), *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    assert "request s: split q8, ok" in result.output
    envelope = json.loads((tmp_path / "out.json").read_text())
    assert envelope["measure"] == "ledger"
    assert set(envelope["summary"]["ways"]) == {"split q8", "gpu", "no route"}
    assert "prefill" in (tmp_path / "out.svg").read_text()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in complete} == {1, 2, 3}
    assert all(event["dur"] > 0 and event["ts"] >= 0 for event in complete)
    by_thread: dict[tuple[int, int], float] = {}
    for event in complete:
        place = (event["pid"], event["tid"])
        assert event["ts"] >= by_thread.get(place, 0.0)
        by_thread[place] = event["ts"] + event["dur"]


def test_the_routers_errors_and_regret() -> None:
    found = ledger.summarize(
        [
            spent(ttft_error=0.5, e2e_error=-0.1, regret_ns=0),
            spent(ttft_error=-0.1, e2e_error=-0.3, regret_ns=33 * MS),
            spent(),
            spent(shadow_of="r", ttft_error=9.0, regret_ns=9000 * MS),
        ]
    )
    assert (found["requests"], found["shadows"], found["ways"]["split q8"]["requests"]) == (3, 1, 3)
    assert found["prediction_error"]["ttft"] == pytest.approx({"median": 0.2, "median_absolute": 0.3, "n": 2})
    assert found["prediction_error"]["e2e"]["median"] == pytest.approx(-0.2)
    assert found["regret"] == pytest.approx({"total_s": 0.033, "share": 0.05, "n": 2})
    lines = "\n".join(ledger.sentences(found))
    assert "ttft by 30% (+20%) and e2e by 20% (-20%): medians, 2 requests" in lines
    assert "would have saved 0.03 s, 5.0% of the time of 2 requests" in lines
    nothing = ledger.summarize([spent()])
    assert nothing["regret"] is None
    assert nothing["prediction_error"] == {"ttft": None, "e2e": None}
    assert "regret" not in "\n".join(ledger.sentences(nothing))


def test_a_request_whose_kv_travelled_is_shown_rather_than_a_later_one_without() -> None:
    entries = [spent(request_id="split"), cpu(1, request_id="cpu"), spent(request_id="lost", status="engine")]
    assert ledger_entries.choose(entries, None).request_id == "split"
    assert ledger_entries.choose(entries[1:], None).request_id == "cpu"
