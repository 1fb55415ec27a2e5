"""The dashboard in a real browser, over the real stack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.dashboard.browser import Open, chromium, needs_chromium, opener
from tests.e2e.conftest import Running

pytestmark = [pytest.mark.engines, needs_chromium]


@pytest.fixture(scope="module")
def open_page() -> Iterator[Open]:
    with chromium() as browser, opener(browser) as open_one:
        yield open_one


def test_a_request_sent_from_the_page_is_drawn_as_the_ledger_has_it(
    stack: Running, http: httpx.Client, shipped_text: str, open_page: Open
) -> None:
    seen = open_page(f"{stack.proxy_url}/#try")
    page: Any = seen.page
    page.fill("#try-prompt", shipped_text)
    page.select_option("#try-route", "all")
    page.fill("#try-tokens", "16")
    page.click("#try-send")
    seen.until("document.querySelectorAll('#answers .request').length === 3", seconds=60)
    assert "Portage" in page.inner_text("#answers")
    seen.view("waterfall")
    seen.until("document.querySelectorAll('#requests .request').length >= 3")
    asked = page.eval_on_selector_all("#answers .request", "all => all.map(row => row.dataset.requestId)")
    entries = {entry["route"]: entry for entry in (http.get(f"/ledger/{each}").json() for each in asked)}
    assert set(entries) == {"split", "gpu", "cpu"}
    expected = {
        "split": {
            "tokenize",
            "reserve",
            "prefill",
            "wire",
            "gather",
            "decode_frame",
            "inject",
            "first_decode",
            "decode",
        },
        "gpu": {"tokenize", "prefill", "decode"},
        "cpu": {"tokenize", "reserve", "prefill", "decode"},
    }
    for route, entry in entries.items():
        bars = f'#requests [data-request-id="{entry["request_id"]}"] .bar'
        drawn = dict(page.eval_on_selector_all(bars, "all => all.map(b => [b.dataset.stage, Number(b.dataset.ns)])"))
        assert expected[route] <= drawn.keys(), route
        assert drawn == {stage: entry[f"{stage}_ns"] for stage in drawn}
    page.hover(f'#requests [data-request-id="{entries["split"]["request_id"]}"] .bar[data-stage="wire"]')
    assert "codec raw" in page.inner_text("#tip")
    assert seen.errors == []
    assert all(address.startswith(stack.proxy_url) for address in seen.asked)
