"""A real headless Chromium, and what a page in it complained about and asked for."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt install chromium")
POLL_MS = 30
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}


@dataclass
class Seen:
    """A page, the errors in its console and the addresses that it asked."""

    page: Any
    errors: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def until(self, script: str, argument: Any = None, seconds: float = 20) -> None:
        """Wait until the expression is true in the page, whose policy forbids it to wait by itself."""
        deadline_s = time.monotonic() + seconds
        while not self.page.evaluate(script, argument):
            assert time.monotonic() < deadline_s, f"it did not come to that: {script}"
            self.page.wait_for_timeout(POLL_MS)

    def view(self, name: str) -> None:
        self.page.click(f'nav a[href="#{name}"]')

    def count(self, selector: str) -> int:
        return int(self.page.locator(selector).count())


Open = Callable[..., Seen]


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser. It finds no host but this one; as root it runs without a sandbox, or it would refuse."""
    from playwright.sync_api import sync_playwright

    arguments = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--no-proxy-server"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opener(browser: Any) -> Iterator[Open]:
    """A function that opens a page in a profile of its own; afterwards all of them are closed."""
    contexts = []

    def open_page(url: str, *, size: dict[str, int] = DESKTOP, live: bool = True, **options: Any) -> Seen:
        context = browser.new_context(viewport=size, reduced_motion="reduce", **options)
        contexts.append(context)
        seen = Seen(context.new_page())
        seen.page.on("console", lambda said: seen.errors.append(said.text) if said.type == "error" else None)
        seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
        seen.page.on("request", lambda request: seen.asked.append(request.url))
        seen.page.on("dialog", lambda dialog: seen.errors.append(f"dialog: {dialog.message}"))
        seen.page.goto(url)
        if live:
            seen.until("document.getElementById('connection').dataset.state === 'live'")
        return seen

    try:
        yield open_page
    finally:
        for context in contexts:
            context.close()
