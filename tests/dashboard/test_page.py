"""The page in a real browser, between fakes that can be made to misbehave."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from measurements import ledger_spans
from measurements.ledger_entries import Spent
from proxy.api_keys import make
from proxy.facts import Prediction
from proxy.ledger import Entry
from tests.dashboard.browser import PHONE, Open, Seen, needs_chromium
from tests.dashboard.entries import varied
from tests.proxy.conftest import Stack, make_cluster, running, wait_until
from tests.proxy.fake_prefill import PrefillScript
from tests.proxy.fake_worker import FakeWorker, Script
from tests.proxy.test_prefill_pool import two_nodes
from tests.proxy.workers import announce
from transfer.energy import POWER_HEADER
from transfer.messages import Announce, Status

pytestmark = needs_chromium

# A frame on a screen of 60 Hz.
FRAME_MS = 1000 / 60


@pytest.fixture(autouse=True)
def fresh_scripts(stack: Stack) -> Iterator[None]:
    stack.prefill.script, stack.worker.script = PrefillScript(), Script()
    yield


@pytest.fixture
def one(stack: Stack) -> Entry:
    assert stack.chat({"X-Isthmus-Route": "split"}).status_code == 200
    return stack.gateway.ledger.last(1)[0]


def add(stack: Stack, entries: Iterator[Entry]) -> None:
    for entry in entries:
        stack.gateway.ledger.add(entry)


def ask_from_the_page(seen: Seen, prompt: str, route: str) -> None:
    seen.view("try")
    seen.page.fill("#try-prompt", prompt)
    seen.page.select_option("#try-route", route)
    seen.page.click("#try-send")
    seen.until("!document.getElementById('try-send').disabled")


@pytest.fixture(autouse=True)
def nothing_measured_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page draws the results that lie where the proxy was started."""
    monkeypatch.chdir(tmp_path)


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


def test_stages_lie_where_the_command_says(stack: Stack, one: Entry, open_page: Open) -> None:
    entries = list(varied(one, 100))
    told = [msgspec.to_builtins(entry) for entry in entries]
    seen = open_page(stack.url)
    script = "async told => { const {spans} = await import('/static/stages.js'); return told.map(spans); }"
    drawn = seen.page.evaluate(script, told)
    for entry, spans in zip(told, drawn, strict=True):
        # The page shows the worker's first token as part of `decode`.
        here = {(s["stage"], s["beginNs"], s["lengthNs"]) for s in spans if s["stage"] != "first_decode"}
        assert here == {tuple(span)[1:] for span in ledger_spans.spans(msgspec.convert(entry, Spent))}
        assert {s["lane"] for s in spans} <= {"proxy", "prefill", "wire", "decode"}


def test_the_entry_opens_with_what_was_predicted(stack: Stack, one: Entry, open_page: Open) -> None:
    entry = next(entry for entry in varied(one, 20) if entry.route == "split")
    seen_before = {
        "split": Prediction(ttft_ns=5_000_000, tpot_ns=1, e2e_ns=9_000_000, samples=4),
        "gpu": Prediction(ttft_ns=7_000_000, tpot_ns=1, e2e_ns=8_000_000, samples=3),
    }
    entry = msgspec.structs.replace(entry, predicted=seen_before)
    add(stack, iter([entry]))
    seen = open_page(stack.url)
    seen.page.click(f'[data-request-id="{entry.request_id}"] .head')
    said = seen.page.inner_text("#entry")
    assert entry.request_id in said
    assert "made up" in said
    stages = seen.page.eval_on_selector_all("[data-stage-ns]", "all => all.map(s => [s.dataset.stageNs, s.dataset.ns])")
    assert len(stages) > 8
    assert all(getattr(entry, f"{stage}_ns") == int(ns) for stage, ns in stages)
    assert "split, taken" in said
    assert "5.0 ms" in said
    assert "8.0 ms" in said


def test_hover_and_tap_tell_bytes_codec_and_rate(stack: Stack, one: Entry, open_page: Open) -> None:
    entry = next(entry for entry in varied(one, 20) if entry.route == "split")
    add(stack, iter([entry]))
    wire = f'[data-request-id="{entry.request_id}"] .bar[data-stage="wire"]'
    seen = open_page(stack.url)
    seen.page.hover(wire)
    told = seen.page.inner_text("#tip")
    assert f"codec {entry.codec}" in told
    assert "MiB of 21.0 MiB" in told
    assert "/s on the wire" in told
    phone = open_page(stack.url, size=PHONE, has_touch=True)
    phone.page.tap(wire)
    assert phone.page.inner_text("#tip") == told
    assert not phone.page.is_visible("#entry")


def test_bars_of_kept_kv_say_how_much_it_was(stack: Stack, one: Entry, open_page: Open) -> None:
    local = {"route": "cpu", "codec": None, "kv_raw_bytes": 0, "kv_wire_bytes": 0, "inject_ns": 10**6}
    kept = {"kv_reused_tokens": 64, "kv_restored_tokens": 48, "restore_ns": 10**6}
    told = msgspec.to_builtins(msgspec.structs.replace(one, **local, **kept))
    script = "async ([entry, stage]) => (await import('/static/stages.js')).about(entry, stage)"
    seen = open_page(stack.url)
    assert seen.page.evaluate(script, [told, "inject"])[-1] == "64 tokens of kept KV"
    assert seen.page.evaluate(script, [told, "restore"])[-1] == "48 tokens"


def test_five_hundred_entries_stay_smooth(stack: Stack, one: Entry, open_page: Open) -> None:
    add(stack, varied(one, 700))
    seen = open_page(stack.url)
    seen.until("document.querySelectorAll('#requests .request').length === 500")
    frames = seen.page.evaluate(
        """() => new Promise(done => {
             const frames = []; let last = performance.now();
             const step = now => {
               frames.push(now - last); last = now; scrollBy(0, 200);
               frames.length < 120 ? requestAnimationFrame(step) : done(frames.slice(1));
             };
             requestAnimationFrame(step);
           })"""
    )
    frames.sort()
    middle, late = frames[len(frames) // 2], sum(frame > 2 * FRAME_MS for frame in frames)
    print(f"500 entries: median frame {middle:.1f} ms, longest {frames[-1]:.1f}, {late} late of {len(frames)}")  # noqa: T201
    assert stack.chat().status_code == 200
    newest = stack.entries()[-1]["request_id"]
    seen.until("id => document.querySelector('#requests .request').dataset.requestId === id", newest)
    assert seen.count("#requests .request") == 500
    assert seen.errors == []


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


def test_by_keyboard_alone(stack: Stack, one: Entry, open_page: Open) -> None:
    add(stack, varied(one, 5))
    seen = open_page(stack.url)
    seen.until("document.querySelectorAll('#requests .request').length >= 5")
    press: Callable[[str], None] = seen.page.keyboard.press
    focused = "document.activeElement"

    def tab_to(what: str) -> None:
        for _ in range(40):
            press("Tab")
            if seen.page.evaluate(f"what => {focused}.matches(what)", what):
                return
        raise AssertionError(f"Tab does not come to {what}")

    tab_to(".skip")
    tab_to("#requests .head")
    newest = seen.page.evaluate(f"{focused}.closest('.request').dataset.requestId")
    press("ArrowRight")
    assert seen.page.is_visible("#tip")
    assert seen.page.evaluate(f"{focused}.getAttribute('aria-label')").startswith(
        seen.page.inner_text("#tip").split("\n")[0]
    )
    press("ArrowDown")
    assert seen.page.evaluate(f"{focused}.closest('.request').dataset.requestId") != newest
    press("Enter")
    assert seen.page.is_visible("#entry")
    press("Escape")
    assert not seen.page.is_visible("#entry")
    seen.page.evaluate(f"{focused}.blur()")
    tab_to('nav a[href="#try"]')
    press("Enter")
    tab_to("#try-prompt")
    seen.page.keyboard.type("hi")
    tab_to("#try-send")
    press("Enter")
    seen.until("document.querySelector('#answers .request')")
    assert seen.page.inner_text("#answers .answer").startswith("one")


@pytest.mark.parametrize("width", [PHONE["width"], 320])
def test_a_phone_scrolls_one_way_only(stack: Stack, one: Entry, open_page: Open, width: int) -> None:
    add(stack, varied(one, 10))
    seen = open_page(stack.url, size=PHONE | {"width": width}, has_touch=True)
    seen.until("document.querySelectorAll('#requests .request').length > 5")
    for view in ("waterfall", "worth", "nodes", "try"):
        seen.view(view)
        if view == "worth":
            seen.until("document.querySelectorAll('#view-worth canvas').length === 2")
        assert seen.page.evaluate("document.scrollingElement.scrollWidth - innerWidth") <= 0, view


def test_light_dark_and_as_the_system_is(stack: Stack, open_page: Open) -> None:
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    light = open_page(stack.url, color_scheme="light").page.evaluate(ground)
    seen = open_page(stack.url, color_scheme="dark")
    dark = seen.page.evaluate(ground)
    assert dark != light
    seen.page.click("#theme")
    assert seen.page.evaluate(ground) == light
    seen.page.reload()
    assert seen.page.evaluate(ground) == light
    seen.page.click("#theme")
    assert seen.page.evaluate(ground) == dark


def test_nothing_is_asked_of_any_other_host(stack: Stack, open_page: Open) -> None:
    seen = open_page(stack.url)
    for view in ("worth", "nodes", "try", "waterfall"):
        seen.view(view)
    paint = seen.page.evaluate("performance.getEntriesByType('paint').map(p => [p.name, p.startTime])")
    script = """() => performance.getEntriesByType('resource').filter(r => r.name.includes('/static/'))
      .reduce((all, r) => all + r.encodedBodySize, performance.getEntriesByType('navigation')[0].encodedBodySize)"""
    weight = seen.page.evaluate(script)
    print(f"{paint}, {weight} bytes")  # noqa: T201
    assert seen.asked
    assert all(address.startswith(stack.url) for address in seen.asked)
    assert weight < 300_000
    assert seen.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(stack: Stack, one: Entry, open_page: Open, scheme: str) -> None:
    add(stack, varied(one, 3))
    seen = open_page(stack.url, color_scheme=scheme)
    # Relative luminance and contrast as WCAG 2 defines them; 4.5 is its level AA for text.
    script = """() => {
      const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
      const pixel = colour => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
      };
      const light = colour => {
        const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
        const [r, g, b] = pixel(colour).map(c => linear(c / 255));
        return .2126 * r + .7152 * g + .0722 * b;
      };
      const ground = e => {
        const own = getComputedStyle(e).backgroundColor;
        return pixel(own)[3] > 0 ? own : ground(e.parentElement);
      };
      const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
      return [...document.querySelectorAll('body *')].filter(e => own(e) && e.checkVisibility()).map(e => {
        const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
        return [(a + .05) / (b + .05), e.tagName + '.' + e.className + ' ' + e.textContent.trim().slice(0, 30)];
      }).filter(([ratio]) => ratio < 4.5);
    }"""
    for view in ("waterfall", "worth", "nodes", "try"):
        seen.view(view)
        assert seen.page.evaluate(script) == [], view


def test_a_screen_reader_finds_names_for_everything(stack: Stack, one: Entry, open_page: Open) -> None:
    add(stack, varied(one, 3))
    seen = open_page(stack.url)
    nameless = """() => [...document.querySelectorAll('button, input, select, textarea, [role$=cell], [role=grid]')]
      .filter(e => !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length)).map(e => e.outerHTML)"""
    # A heading is at most one level below the one before it.
    jumps = """() => [...document.querySelectorAll('h1, h2, h3, h4')].filter(e => e.checkVisibility())
      .map(e => Number(e.tagName[1])).some((level, place, all) => place && level > all[place - 1] + 1)"""
    for view in ("waterfall", "worth", "nodes", "try"):
        seen.view(view)
        assert seen.page.evaluate(nameless) == []
        assert not seen.page.evaluate(jumps), view
    seen.view("waterfall")
    seen.page.click("#waterfall-as-table")
    assert seen.count("#requests-table tbody tr") >= 3
