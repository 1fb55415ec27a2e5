"""Pictures of the dashboard for the README: ``python -m tests.dashboard.screenshots URL`` of a proxy that serves."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from tests.dashboard.browser import DESKTOP, PHONE, Open, Seen, chromium, opener

FOLDER = Path(__file__).parents[2] / "proxy" / "dashboard" / "screenshots"
COLOURS = 128
LARGEST_BYTES = 150_000
QUESTION = "Where does the river end, and who lives there? Answer in one sentence."


def main(url: str) -> None:
    """Ask by every route, then look at every view."""
    FOLDER.mkdir(exist_ok=True)
    with chromium() as browser, opener(browser) as open_page:
        seen = open_page(f"{url}/#try", color_scheme="light")
        seen.page.fill("#try-prompt", QUESTION)
        seen.page.select_option("#try-route", "all")
        seen.page.click("#try-send")
        seen.until("document.querySelectorAll('#answers .request').length === 3", seconds=120)
        save(seen, "try")
        for name, view, options in (
            ("waterfall", "waterfall", {"size": DESKTOP, "color_scheme": "light"}),
            ("waterfall-dark", "waterfall", {"size": DESKTOP, "color_scheme": "dark"}),
            ("worth", "worth", {"size": DESKTOP, "color_scheme": "light"}),
            ("nodes", "nodes", {"size": DESKTOP, "color_scheme": "dark"}),
            ("phone", "waterfall", {"size": PHONE, "has_touch": True, "color_scheme": "light"}),
        ):
            save(picture_of(open_page, f"{url}/#{view}", **options), name)


def picture_of(open_page: Open, url: str, **options: Any) -> Seen:
    """The page, with what it shows drawn."""
    seen = open_page(url, **options)
    seen.page.wait_for_timeout(2500)
    return seen


def save(seen: Seen, name: str) -> None:
    """As a PNG of few colours, which is a quarter of the size."""
    picture = Image.open(io.BytesIO(seen.page.screenshot())).convert("RGB").quantize(COLOURS)
    path = FOLDER / f"{name}.png"
    picture.save(path, optimize=True)
    size_bytes = path.stat().st_size
    print(f"{path.name}: {size_bytes:,} bytes")  # noqa: T201
    if size_bytes > LARGEST_BYTES:
        sys.exit(f"{path.name} is over {LARGEST_BYTES:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
