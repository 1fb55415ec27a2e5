"""``isthmus proxy``: uvicorn around the application."""

from __future__ import annotations

import math
import socket

import structlog
import uvicorn

from proxy.app import create_app
from proxy.events import Events
from transfer.config import Cluster
from transfer.errors import EngineError
from transfer.notify import Supervisor

log = structlog.get_logger()


def run(cluster: Cluster) -> None:
    """Serve until SIGINT or SIGTERM; open requests get ``[proxy] drain_s`` to finish and are aborted then.

    Raises :class:`EngineError` if the application could not start.
    """
    scheme = "https" if cluster.proxy.tls_cert else "http"
    log.info("proxy starts", url=f"{scheme}://{cluster.proxy.host}:{cluster.proxy.port}", model=cluster.pair.name)
    app = create_app(cluster)
    config = uvicorn.Config(
        app,
        host=cluster.proxy.host,
        port=cluster.proxy.port,
        log_level="warning",
        access_log=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=math.ceil(cluster.proxy.drain_s),
        ssl_certfile=cluster.proxy.tls_cert or None,
        ssl_keyfile=cluster.proxy.tls_key or None,
    )
    server = _Server(config, app.state.gateway.events)
    server.run()
    if not server.started:
        raise EngineError("the proxy did not start; the log above says why")


class _Server(uvicorn.Server):
    """Also tells systemd that the event loop turns, and ends streams of events when it is asked to end."""

    def __init__(self, config: uvicorn.Config, events: Events) -> None:
        super().__init__(config)
        self._supervisor = Supervisor()
        self._events = events

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._events.close()
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        self._supervisor.alive()
        return await super().on_tick(counter)
