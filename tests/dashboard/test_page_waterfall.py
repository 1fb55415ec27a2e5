"""The page's waterfall in a real browser: where stages lie, what they say, and how smoothly."""

from __future__ import annotations

import msgspec
import pytest

from measurements import ledger_spans
from measurements.ledger_entries import Spent
from proxy.facts import Prediction
from proxy.ledger import Entry
from tests.dashboard.browser import PHONE, Open, needs_chromium
from tests.dashboard.entries import add, varied
from tests.proxy.conftest import Stack

pytestmark = [needs_chromium, pytest.mark.usefixtures("fresh_scripts", "nothing_measured_yet")]

# A frame on a screen of 60 Hz.
FRAME_MS = 1000 / 60


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
