"""Serves the dashboard's files; they hold no data: the page fetches it from ``/events``, ``/ledger`` and ``/nodes``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC = Path(__file__).parent / "static"
# Nothing comes from elsewhere and nothing goes there; no script or style stands in the page itself.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Asked for again each time, and not sent again if it is the same: a new version shows at once.
    "Cache-Control": "no-cache",
}
# What `isthmus measure ... --json` wrote, seen from where the proxy was started, is shown beside what happens.
SHOWN = ("crossover", "link")
FOLDERS = (Path(), Path("measurements/results"))
LARGEST_BYTES = 64 << 20

log = structlog.get_logger()


def add(app: FastAPI) -> None:
    """Serve the page at ``/``, what it consists of under ``/static``, and results at ``/dashboard/measured``."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html", headers=HEADERS)

    @app.get("/dashboard/measured", include_in_schema=False)
    def measured() -> Response:
        return JSONResponse({name: result(name) for name in SHOWN})

    app.mount("/static", _Files(directory=STATIC))


def result(measure: str) -> dict[str, Any] | None:
    """Command and summary of what `isthmus measure` found here of ``measure``; None if there is no such result."""
    path = next((path for folder in FOLDERS if (path := folder / f"{measure}.json").is_file()), None)
    if path is None:
        return None
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ValueError(f"over {LARGEST_BYTES >> 20} MiB")
        envelope = json.loads(path.read_text())
        if envelope.get("measure") != measure:
            raise ValueError(f"no result of `isthmus measure {measure}`")
        return {"command": envelope["command"], "summary": envelope["summary"]}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        log.warning("the dashboard leaves a result out", path=str(path), reason=str(error))
        return None


class _Files(StaticFiles):
    """With the headers that the page has, too."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        answer = await super().get_response(path, scope)
        answer.headers.update(HEADERS)
        return answer
