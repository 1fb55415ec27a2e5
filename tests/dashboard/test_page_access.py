"""The page by keyboard, on a phone, in either colour, for a screen reader, and what it asks of others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxy.ledger import Entry
from tests.dashboard.browser import PHONE, Open, needs_chromium
from tests.dashboard.entries import add, varied
from tests.proxy.conftest import Stack

pytestmark = [needs_chromium, pytest.mark.usefixtures("fresh_scripts", "nothing_measured_yet")]


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
