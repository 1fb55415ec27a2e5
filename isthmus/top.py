"""``isthmus top``: nodes, the last requests and what splitting gained, live in a terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import httpx
import msgspec
from rich.console import Console, RenderableType
from rich.live import Live

from isthmus import top_view
from transfer.errors import LinkError, RequestError

CONNECT_S = 3.0
# The proxy says something every second.
SILENCE_S = 10.0
RETRY_S = 1.0
REDRAW_S = 0.25
# As many requests as totals are over.
KEPT_ENTRIES = 500


class Said(NamedTuple):
    """One thing heard: a closed ledger entry, what ``/totals`` or ``/nodes`` say, or why the proxy cannot be heard."""

    kind: Literal["entry", "totals", "nodes", "lost"]
    what: Any


class Watched:
    """What is known of a proxy."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.entries: deque[dict[str, Any]] = deque(maxlen=KEPT_ENTRIES)
        self.nodes: dict[str, Any] | None = None
        self.totals: dict[str, Any] | None = None
        self.lost: str | None = "connecting"

    def take(self, said: Said) -> None:
        """Take in one thing that was heard."""
        match said.kind:
            case "entry":
                self.entries.append(said.what)
            case "totals":
                self.totals = said.what
            case "nodes":
                self.nodes, self.lost = said.what, None
            case "lost":
                self.lost = said.what

    def render(self, height: int, width: int) -> RenderableType:
        """A picture of at most about ``height`` lines of ``width`` cells."""
        return top_view.screen(self.url, self.lost, self.nodes, list(self.entries), self.totals, height, width)


def run(url: str, api_key: str | None) -> None:
    """Show the proxy at ``url`` until Ctrl-C; where nobody watches, print one picture and end.

    A proxy that goes away is waited for, where somebody watches. Raises :class:`RequestError` if it does not know the
    key, and :class:`LinkError` if nobody watches and it cannot be heard.
    """
    console = Console()
    watched = Watched(url)
    if not console.is_terminal:
        for said in follow(url, api_key):
            watched.take(said)
            if said.kind == "lost":
                raise LinkError(f"no word from the proxy at {url}: {said.what}")
            # The totals come behind the nodes.
            if said.kind == "totals":
                console.print(watched.render(60, console.width))
                return
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            drawn_s = 0.0
            for said in follow(url, api_key):
                watched.take(said)
                if said.kind != "entry" or time.monotonic() - drawn_s > REDRAW_S:
                    drawn_s = time.monotonic()
                    live.update(watched.render(console.height, console.width), refresh=True)
    except KeyboardInterrupt:
        return


def follow(url: str, api_key: str | None, retry_s: float = RETRY_S) -> Iterator[Said]:
    """Everything that the proxy at ``url`` says from now on, after the last entries of its ledger; never ends.

    Raises :class:`RequestError` if it does not know ``api_key``.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(SILENCE_S, connect=CONNECT_S)
    last_id = "0"
    began = False
    with httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False) as client:
        while True:
            try:
                if not began:
                    entries = _checked(client.get("/ledger", params={"last": KEPT_ENTRIES})).json()["entries"]
                    yield from (Said("entry", entry) for entry in entries)
                    last_id = str(entries[-1]["seq"]) if entries else last_id
                    began = True
                with client.stream("GET", "/events", headers={"Last-Event-ID": last_id}) as answer:
                    for event, data, event_id in _events(_checked(answer)):
                        last_id = event_id or last_id
                        if event == "entry":
                            yield Said("entry", msgspec.json.decode(data))
                        elif event == "nodes":
                            yield Said("nodes", msgspec.json.decode(data))
                        elif event == "totals":
                            yield Said("totals", msgspec.json.decode(data))
                reason = "the proxy ended the stream"
            except (httpx.HTTPError, msgspec.DecodeError) as error:
                reason = str(error) or type(error).__name__
            yield Said("lost", reason)
            time.sleep(retry_s)


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise RequestError("the proxy does not know this API key: use --api-key, or ISTHMUS_API_KEY", "--api-key")
    return answer.raise_for_status()


def _events(answer: httpx.Response) -> Iterator[tuple[str, str, str | None]]:
    """Event, data and id of each server-sent event (https://html.spec.whatwg.org/#parsing-an-event-stream)."""
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        if line:
            name, _, value = line.partition(":")
            if name:
                fields[name] = value.removeprefix(" ")
        elif fields:
            if "data" in fields:
                yield fields.get("event", "message"), fields["data"], fields.get("id")
            fields = {}
