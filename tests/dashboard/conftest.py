"""A browser for each file of tests, and a proxy between fakes for it to look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dashboard.browser import Open, chromium, opener
from tests.proxy.conftest import Stack, hf_dir, make_cluster, running  # noqa: F401 - a fixture


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
