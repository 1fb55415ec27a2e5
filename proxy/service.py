"""``isthmus proxy``: uvicorn around the application."""

from __future__ import annotations

import structlog
import uvicorn

from proxy.app import create_app
from transfer.config import Cluster
from transfer.errors import EngineError

DRAIN_S = 5

log = structlog.get_logger()


def run(cluster: Cluster) -> None:
    """Serve until SIGINT or SIGTERM; open requests get ``DRAIN_S`` seconds to finish and are aborted then.

    Raises :class:`EngineError` if the application could not start.
    """
    log.info("proxy starts", url=f"http://{cluster.proxy.host}:{cluster.proxy.port}", model=cluster.pair.name)
    config = uvicorn.Config(
        create_app(cluster),
        host=cluster.proxy.host,
        port=cluster.proxy.port,
        log_level="warning",
        access_log=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=DRAIN_S,
    )
    server = uvicorn.Server(config)
    server.run()
    if not server.started:
        raise EngineError("the proxy did not start; the log above says why")
