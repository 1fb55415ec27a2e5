"""The door in front of the application: who presents no API key gets no further than ``/health`` and an empty page."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy import request_id
from proxy.api_keys import NOBODY, ApiKey, ApiKeys
from proxy.failures import AuthenticationError, describe

# The dashboard's page and what it consists of hold no data.
_OPEN_PATHS = ("/", "/health", "/health/live", "/health/ready")
_OPEN_FILES = "/static/"


class Guard:
    """ASGI middleware; whose key it is stands in ``scope["state"]["api_key"]``; ``refused`` counts who has none."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, refused: Callable[[str], None]) -> None:
        self._app = app
        self._keys = keys
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer 401."""
        if scope["type"] == "http":
            holder = self._holder(scope)
            if holder is None:
                failed = describe(AuthenticationError("a valid API key is needed: Authorization: Bearer KEY"))
                self._refused(failed.code)
                headers = failed.headers | {request_id.HEADER: request_id.of_refused(Headers(scope=scope))}
                await JSONResponse(failed.body, failed.status, headers)(scope, receive, send)
                return
            scope.setdefault("state", {})["api_key"] = holder
        await self._app(scope, receive, send)

    def _holder(self, scope: Scope) -> ApiKey | None:
        path: str = scope["path"]
        if not self._keys or path in _OPEN_PATHS or path.startswith(_OPEN_FILES):
            return NOBODY
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        return self._keys.holder(key.strip()) if scheme.lower() == "bearer" else None
