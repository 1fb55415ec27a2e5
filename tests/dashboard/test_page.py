"""The page in a real browser, between fakes that can be made to misbehave."""

from __future__ import annotations

import functools
import statistics
from pathlib import Path

import msgspec
import pytest

from proxy.api_keys import make
from proxy.ledger import Entry
from tests.dashboard.browser import Open, Seen, needs_chromium
from tests.dashboard.entries import add, varied
from tests.proxy.conftest import Stack, make_cluster, running, wait_until
from tests.proxy.fake_worker import FakeWorker
from tests.proxy.test_prefill_pool import two_nodes
from tests.proxy.workers import announce
from transfer.energy import POWER_HEADER
from transfer.messages import Announce, Status

pytestmark = [needs_chromium, pytest.mark.usefixtures("fresh_scripts", "nothing_measured_yet")]


def ask_from_the_page(seen: Seen, prompt: str, route: str) -> None:
    seen.view("try")
    seen.page.fill("#try-prompt", prompt)
    seen.page.select_option("#try-route", route)
    seen.page.click("#try-send")
    seen.until("!document.getElementById('try-send').disabled")


def test_a_question_is_answered_and_appears_in_the_waterfall(stack: Stack, open_page: Open) -> None:
    seen = open_page(stack.url)
    ask_from_the_page(seen, "hi", "split")
    assert seen.page.inner_text("#answers .answer") == "one two three"
    entry = stack.entries()[-1]
    row = f'[data-request-id="{entry["request_id"]}"]'
    assert seen.count(f"#answers {row} .bar") > 0
    seen.view("waterfall")
    seen.until(f"document.querySelector('#requests {row}')")
    bars = seen.page.eval_on_selector_all(
        f"#requests {row} .bar", "all => all.map(b => [b.dataset.stage, b.dataset.ns])"
    )
    assert {"prefill", "transfer_exposed", "decode"} <= {stage for stage, _ in bars}
    assert all(entry[f"{stage}_ns"] == int(ns) for stage, ns in bars)
    assert seen.errors == []


def test_all_routes_side_by_side(stack: Stack, open_page: Open) -> None:
    seen = open_page(stack.url)
    ask_from_the_page(seen, "hi", "all")
    shown = seen.page.eval_on_selector_all("#answers .card", "all => all.map(c => c.dataset.route)")
    assert shown == ["split", "gpu", "cpu"] == [entry["route"] for entry in stack.entries()[-3:]]
    assert seen.count("#answers .request") == 3
    # On one scale: tracks are as long as what they show.
    script = """all => all.map(lanes => [
      Number(lanes.style.getPropertyValue('--length')), lanes.querySelector('.track').getBoundingClientRect().width
    ])"""
    lengths, widths = zip(*seen.page.eval_on_selector_all("#answers .lanes", script), strict=True)
    assert [width / max(widths) for width in widths] == pytest.approx([ns / max(lengths) for ns in lengths], rel=0.02)
    assert seen.page.evaluate("[...document.querySelectorAll('.answer')].every(a => a.ariaBusy === 'false')")


def test_a_route_that_fails_says_why(stack: Stack, open_page: Open) -> None:
    stack.prefill.script.refuse = (500, "no <b>memory</b>")
    seen = open_page(stack.url)
    ask_from_the_page(seen, "hi", "gpu")
    assert "no <b>memory</b>" in seen.page.inner_text("#answers")


def test_an_answer_can_be_stopped(stack: Stack, open_page: Open) -> None:
    stack.prefill.script.endless = True
    seen = open_page(stack.url)
    seen.view("try")
    seen.page.fill("#try-prompt", "hi")
    seen.page.select_option("#try-route", "gpu")
    seen.page.click("#try-send")
    seen.until("document.querySelector('#answers .answer').textContent.length > 20")
    seen.page.click("#try-stop")
    seen.until("!document.getElementById('try-send').disabled")
    assert "stopped" in seen.page.inner_text("#answers")
    stack.assert_idle()


def test_charts_say_what_the_ledger_says(stack: Stack, one: Entry, open_page: Open) -> None:
    add(stack, varied(one, 40))
    seen = open_page(stack.url)
    seen.view("worth")
    seen.until("document.querySelectorAll('#view-worth canvas').length === 2")
    entries = stack.http.get("/ledger?last=500").json()["entries"]
    gains = [entry["specialization_gain_ns"] for entry in entries if entry["specialization_gain_ns"] is not None]
    rows = seen.page.eval_on_selector_all(
        "#ways-table tbody tr", "all => all.map(r => [...r.children].map(c => c.textContent))"
    )
    assert {row[0] for row in rows} == {" ".join(filter(None, (entry["route"], entry["codec"]))) for entry in entries}
    assert seen.count("#scatter-table tbody tr") == len(gains)
    assert f"{len(gains)} of the last {len(entries)} requests" in seen.page.inner_text("#verdict")
    net = f"{abs(sum(gains)) / 1e9:,.1f} s" if abs(sum(gains)) >= 10e9 else f"{abs(sum(gains)) / 1e6:,.1f} ms"
    assert net in seen.page.inner_text("#verdict")
    assert seen.errors == []


def cells(seen: Seen, table: str) -> dict[str, list[str]]:
    """The rows of a table by their headings."""
    script = "all => all.map(row => [...row.children].map(cell => cell.textContent))"
    return {first: rest for first, *rest in seen.page.eval_on_selector_all(f"{table} tbody tr", script)}


def test_totals_are_of_more_than_the_page_has(stack: Stack, one: Entry, open_page: Open) -> None:
    add(stack, varied(one, 700))
    seen = open_page(f"{stack.url}/#worth")
    seen.until("document.getElementById('totals-summary').textContent.includes('since')")
    totals = stack.http.get("/totals").json()
    requests = sum(way["requests"] for way in totals["ways"])
    assert requests > 700
    assert f"All {requests:,} requests since" in seen.page.inner_text("#totals-summary")
    shown, window = cells(seen, "#totals-table"), cells(seen, "#ways-table")
    for way in totals["ways"]:
        name = " ".join(filter(None, (way["route"], way["codec"])))
        assert shown[name][0] == f"{way['answered']:,} of {way['requests']:,}"
        if way["codec"]:
            assert shown[name][3] == f"{(way['gained_ns'] + way['lost_ns']) / 1e9:+,.1f} s"
            assert shown[name][3] != window[name][3]
    # The line over the last requests ends where the sums are, having begun with what was gained before.
    net_s = sum(way["gained_ns"] + way["lost_ns"] for way in totals["ways"]) / 1e9
    script = """async () => {
      const {gainedBefore} = await import('/static/worth.js');
      const ask = async path => (await fetch(path)).json();
      const [{entries}, totals] = await Promise.all([ask('/ledger?last=500'), ask('/totals')]);
      const split = entries.filter(e => e.specialization_gain_ns !== null);
      const before = [...gainedBefore(split, totals).values()].reduce((a, b) => a + b, 0);
      return before + split.reduce((sum, e) => sum + e.specialization_gain_ns / 1e9, 0);
    }"""
    assert seen.page.evaluate(script) == pytest.approx(net_s)
    assert seen.errors == []


def test_what_is_found_out_later_shows_in_the_line_and_the_open_entry(
    stack: Stack, one: Entry, open_page: Open
) -> None:
    seen = open_page(stack.url)
    head = f'[data-request-id="{one.request_id}"] .head'
    seen.page.click(f"#requests {head}")
    assert "KL" not in seen.page.inner_text("#entry dl")
    (inbox,) = stack.gateway.events._inboxes
    found = functools.partial(stack.gateway._compared, one.seq, "raw", 0.0123)
    inbox._news._loop.call_soon_threadsafe(found)  # type: ignore[attr-defined]
    seen.until("document.querySelector('#entry dl').textContent.includes('0.0123 nats')")
    assert "KL 0.0123" in seen.page.inner_text(f"#requests {head}")
    seen.page.keyboard.press("Escape")
    # Focus stays in the line that is drawn again.
    assert seen.page.evaluate("document.activeElement.closest('.request') !== null")
    asked = [{"role": "user", "content": "what would another route have cost?"}]
    seen.page.evaluate("document.activeElement.blur()")
    stack.chat(messages=asked)
    first = stack.gateway.ledger.last(1)[0]
    others = {"split", "gpu", "cpu"} - {first.route}
    for route in sorted(others):
        stack.chat({"X-Isthmus-Route": route}, messages=asked)
    assert next(e for e in stack.entries() if e["seq"] == first.seq)["regret_ns"] is not None
    seen.view("worth")
    assert first.route is not None
    seen.until(
        "route => [...document.querySelectorAll('#router-table tr')].some(r => r.cells[0].textContent === route"
        " && Number(r.cells[6].textContent) >= 1)",
        first.route,
    )
    assert seen.errors == []


def test_how_far_predictions_were_off(stack: Stack, one: Entry, open_page: Open) -> None:
    for number, (ttft, e2e) in enumerate(((-0.2, 0.1), (0.0, 0.3), (0.4, 0.5))):
        strange = msgspec.structs.replace(one, route="gpu", codec=None, request_id=f"e{number}")
        add(stack, iter([msgspec.structs.replace(strange, ttft_error=ttft, e2e_error=e2e, shadow_of="x")]))
    seen = open_page(f"{stack.url}/#worth")
    seen.until("document.querySelector('#router-table tbody tr')")
    ours = [entry for entry in stack.http.get("/ledger?last=500").json()["entries"] if entry["route"] == "gpu"]
    errors = [entry["e2e_error"] for entry in ours if entry["e2e_error"] is not None]
    shown = cells(seen, "#router-table")["gpu"]
    assert shown[0] == str(len(errors))
    assert shown[3] == f"{statistics.median(errors):+.1%}"


def test_power_is_shown_where_it_is_known(stack: Stack, open_page: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = open_page(f"{stack.url}/#nodes")
    seen.until("document.querySelector('#workers dl')")
    assert " W" not in seen.page.inner_text("#view-nodes")
    plain = FakeWorker._status

    def with_power(worker: FakeWorker) -> Status:
        known = {
            "package_watts": 80.0,
            "dram_watts": 10.0,
            "power_of": "package-1, dram-1",
            "decode_tokens_per_s": 20.0,
        }
        return msgspec.structs.replace(plain(worker), **known)  # type: ignore[arg-type]

    monkeypatch.setattr(FakeWorker, "_status", with_power)
    stack.prefill.health_headers = {POWER_HEADER: '{"watts": 213.4, "of": "gpu 0"}'}
    seen.until("document.getElementById('cluster').textContent.includes('213.4 W (gpu 0)')")
    seen.until(
        "document.getElementById('workers').textContent.includes('90.0 W, 10.0 W of it DRAM (package-1, dram-1)')"
    )
    assert "4.5 J" in seen.page.inner_text("#workers")
    stack.prefill.health_headers = {}
    seen.until("!document.getElementById('cluster').textContent.includes(' W')")


def test_each_prefill_node_has_a_card_and_an_entry_says_which_was_asked(hf_dir: Path, open_page: Open) -> None:
    with two_nodes(hf_dir) as two:
        seen = open_page(two.stack.url)
        seen.until("document.querySelectorAll('[data-node=prefill]').length === 2")
        assert all(f"http://{name}" in seen.page.inner_text("#cluster") for name in two.fakes)
        assert two.stack.chat({"X-Isthmus-Route": "split", "X-Request-Id": "mine"}).status_code == 200
        seen.page.click('[data-request-id="mine"] .head')
        assert two.served()[0] in seen.page.inner_text("#entry")
        assert seen.errors == []


def test_the_measured_crossover_is_drawn(stack: Stack, open_page: Open, tmp_path: Path) -> None:
    seen = open_page(stack.url)
    seen.view("worth")
    assert not seen.page.is_visible("#crossover")
    gain = {"1": {"ratio": 0.8, "pays": False}, "4": {"ratio": 1.3, "pays": True}}
    made = {"verdict": "no clear difference", "gain": gain}
    summary = {
        "verdict": {"short chat": "no clear difference"},
        "workloads": {"short chat": made},
        "prompt_length": made,
    }
    envelope = {"measure": "crossover", "command": ["isthmus", "measure", "crossover"], "summary": summary}
    (tmp_path / "crossover.json").write_bytes(msgspec.json.encode(envelope))
    seen = open_page(f"{stack.url}/#worth")
    seen.until("document.querySelector('#crossover-chart canvas')")
    said = seen.page.inner_text("#crossover")
    assert "no clear difference" in said
    assert "4 requests at once" in said
    assert "4 prompt tokens" in said
    assert seen.count("#crossover canvas") == 2
    assert seen.errors == []


def test_a_worker_comes_goes_red_and_is_gone(stack: Stack, open_page: Open) -> None:
    seen = open_page(f"{stack.url}/#nodes")
    state = "name => document.querySelector(`[data-worker='${name}']`)?.dataset.state"
    (pinned,) = stack.gateway.workers.nodes
    seen.until(f"name => ({state})(name) === 'up'", pinned)
    endpoint = f"tcp://127.0.0.1:{stack.gateway.cluster.decode.control_port}"
    stack.worker.close()
    seen.until(f"name => ({state})(name) === 'down'", pinned)
    stack.worker = FakeWorker(endpoint)
    seen.until(f"name => ({state})(name) === 'up'", pinned)
    assert seen.errors == []


PWN = "<img src=x onerror=window.pwned=1><script>window.pwned=1</script>"


def test_markup_is_text_wherever_it_comes_from(hf_dir: Path, open_page: Open) -> None:
    cluster = make_cluster(hf_dir)
    cluster = msgspec.structs.replace(cluster, pair=msgspec.structs.replace(cluster.pair, name=PWN))
    with running(cluster) as stack:
        stack.prefill.script.first_text = PWN
        stack.worker.script.texts = [PWN]
        seen = open_page(stack.url)
        announce(stack, Announce(worker=PWN, control_endpoint="tcp://127.0.0.1:1"))
        wait_until(lambda: PWN in stack.gateway.workers.nodes)
        ask_from_the_page(seen, PWN, "split")
        assert seen.page.inner_text("#answers .answer") == PWN * 2
        last = stack.gateway.ledger.last(1)[0]
        strange = msgspec.structs.replace(last, request_id=PWN, worker=PWN, status=PWN, reason=PWN, codec=PWN)
        stack.gateway.ledger.add(strange)
        seen.page.reload()
        seen.until("pwn => document.querySelector('h1').textContent.includes(pwn)", PWN)
        seen.view("waterfall")
        seen.until("document.querySelectorAll('#requests .request').length > 1")
        seen.page.click("#requests .request:first-child .head")
        assert PWN in seen.page.inner_text("#entry")
        seen.page.keyboard.press("Escape")
        seen.view("nodes")
        seen.until("pwn => document.getElementById('workers').textContent.includes(pwn)", PWN)
        seen.view("worth")
        seen.until("pwn => document.getElementById('ways-table').textContent.includes(pwn)", PWN)
        assert seen.count("img, main script") == 0
        assert seen.page.evaluate("window.pwned") is None
        # The address of the image would be asked.
        assert not [address for address in seen.asked if address.endswith("/x")]


def test_the_key_is_asked_for_once(hf_dir: Path, tmp_path: Path, open_page: Open) -> None:
    key = make(tmp_path / "keys", "me")
    with running(make_cluster(hf_dir, api_keys_file=str(tmp_path / "keys"))) as stack:  # type: ignore[arg-type]
        seen = open_page(stack.url, live=False)
        seen.page.wait_for_selector("#ask-key[open]")
        seen.page.fill("#key-value", "wrong")
        seen.page.keyboard.press("Enter")
        seen.until("document.getElementById('key-wrong').textContent.includes('does not know')")
        seen.page.fill("#key-value", key)
        seen.page.keyboard.press("Enter")
        seen.until("document.getElementById('connection').dataset.state === 'live'")
        assert not seen.page.is_visible("#ask-key")
        seen.page.reload()
        seen.until("document.getElementById('connection').dataset.state === 'live'")
        assert key not in "".join(seen.asked)


def test_nobody_is_asked_for_a_key_again_and_again(hf_dir: Path, tmp_path: Path, open_page: Open) -> None:
    key = make(tmp_path / "keys", "me")
    with running(make_cluster(hf_dir, api_keys_file=str(tmp_path / "keys"))) as stack:  # type: ignore[arg-type]
        seen = open_page(stack.url, live=False)
        seen.page.wait_for_selector("#ask-key[open]")
        seen.page.keyboard.press("Escape")
        seen.until("document.getElementById('connection').title.includes('no API key: see the button')")
        assert not seen.page.is_visible("#ask-key")
        seen.page.click("#key")
        seen.page.fill("#key-value", key)
        seen.page.keyboard.press("Enter")
        seen.until("document.getElementById('connection').dataset.state === 'live'")
        seen.until("document.querySelector('h1').textContent.includes('tiny')")


def test_the_proxy_goes_away_and_comes_back(hf_dir: Path, open_page: Open) -> None:
    cluster = make_cluster(hf_dir)
    state = "document.getElementById('connection').dataset.state"
    with running(cluster) as stack:
        assert stack.chat().status_code == 200
        seen = open_page(stack.url)
        assert seen.count("#requests .request") == 1
    seen.until(f"{state} === 'lost'")
    with running(cluster) as stack:
        seen.until(f"{state} === 'live'")
        assert stack.chat().status_code == 200
        seen.until("document.querySelectorAll('#requests .request').length === 2")
