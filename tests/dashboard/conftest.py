"""A browser for each file of tests, and a proxy between fakes for it to look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.ledger import Entry
from tests.dashboard.browser import Open, chromium, opener
from tests.proxy.conftest import Stack, hf_dir, make_cluster, running  # noqa: F401 - a fixture
from tests.proxy.fake_prefill import PrefillScript
from tests.proxy.fake_worker import Script


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Playwright's loop runs in this thread as long as it is open, so it must not outlive the file."""
    with chromium() as opened:
        yield opened


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    with opener(browser) as open_one:
        yield open_one


@pytest.fixture(scope="module")
def stack(hf_dir: Path) -> Iterator[Stack]:  # noqa: F811
    with running(make_cluster(hf_dir)) as up:
        yield up


@pytest.fixture
def fresh_scripts(stack: Stack) -> None:
    """Nothing misbehaves because another test had it so."""
    stack.prefill.script, stack.worker.script = PrefillScript(), Script()


@pytest.fixture
def nothing_measured_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page draws the results that lie where the proxy was started."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def one(stack: Stack) -> Entry:
    """The entry of a request that was split."""
    assert stack.chat({"X-Isthmus-Route": "split"}).status_code == 200
    return stack.gateway.ledger.last(1)[0]
