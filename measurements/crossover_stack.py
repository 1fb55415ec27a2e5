"""Whom ``measure crossover`` asks: a stack that it brings up itself, as ``isthmus up`` does, or one that runs."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec
from rich.console import Console

from isthmus.children import Child, Children
from isthmus.ports import free_ports
from isthmus.up import GRACE_S, START_DEADLINE_S, Stack, with_keys
from measurements.crossover_plan import REPLICATED
from measurements.load_generator import Target
from transfer.config import Cluster, Pair, dump
from transfer.errors import ConfigError, IsthmusError, LinkError

_TIMEOUT_S = 5.0


class OwnStack:
    """All nodes of ``cluster`` on this host, and a second proxy before the same engines, which works round robin.

    Entered, all are healthy. Raises :class:`EngineError` as :class:`isthmus.up.Stack` does.
    """

    def __init__(self, cluster: Cluster, folder: Path, console: Console) -> None:
        self._cluster = cluster
        self._folder = folder
        self._console = console
        self._exits = ExitStack()
        self._stack: Stack
        self._second: Children
        self._second_url = ""

    def __enter__(self) -> Self:
        with ExitStack() as exits:
            cluster = with_keys(self._cluster, self._folder / "keys")
            self._stack = exits.enter_context(Stack(cluster, self._folder, console=self._console))
            [port] = free_ports(1)
            other = msgspec.structs.replace(
                cluster.proxy, port=port, registry_port=0, policy="round_robin", ledger_file="", host="127.0.0.1"
            )
            config = self._folder / "replicated.toml"
            config.write_bytes(dump(msgspec.structs.replace(cluster, proxy=other)))
            self._second_url = f"http://127.0.0.1:{port}"
            child = Child(
                name="replicated",
                command=[sys.executable, "-P", "-m", "isthmus", "proxy", "--config", str(config)],
                is_healthy=lambda: _has_both_nodes(self._second_url),
            )
            self._second = exits.enter_context(
                Children([child], self._folder, start_deadline_s=START_DEADLINE_S, grace_s=GRACE_S)
            )
            self._second.start(lambda _: None)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def target(self, option: str) -> Target:
        """Whom to ask for ``option``."""
        url = self._second_url if option == REPLICATED else self._stack.proxy_url
        return Target(url, self._cluster.pair.name, self._cluster.pair.hf_dir)

    def require_alive(self) -> None:
        """Raise :class:`EngineError` if a node has died."""
        self._stack.require_alive()
        self._second.require_alive()


class RunningStack:
    """The proxy at ``url``, and the one at ``replicated_url`` that sends requests round robin, if there is one."""

    def __init__(self, url: str, replicated_url: str | None, pair: Pair) -> None:
        self._urls = {"": url.rstrip("/"), REPLICATED: (replicated_url or "").rstrip("/")}
        self._pair = pair

    def __enter__(self) -> Self:
        for url in filter(None, self._urls.values()):
            served = [model["id"] for model in _get(f"{url}/v1/models").get("data", [])]
            if self._pair.name not in served:
                raise ConfigError(
                    f"{url} serves {', '.join(served) or 'nothing'}, not {self._pair.name}; name its cluster file with"
                    " --config, for the tokenizer"
                )
        self.require_alive()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def target(self, option: str) -> Target:
        """Whom to ask for ``option``."""
        return Target(self._urls.get(option) or self._urls[""], self._pair.name, self._pair.hf_dir)

    def require_alive(self) -> None:
        """Raise :class:`LinkError` unless both nodes are up."""
        for url in filter(None, self._urls.values()):
            if not _has_both_nodes(url):
                raise LinkError(f"{url}/health does not say that both nodes are up")


def _has_both_nodes(url: str) -> bool:
    try:
        state = _get(f"{url}/health")
    except IsthmusError:
        return False
    return state.get("prefill") == "up" and state.get("decode") == "up"


def _get(url: str) -> dict[str, Any]:
    try:
        # As the load generator does.
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = httpx.get(url, headers=headers, timeout=_TIMEOUT_S, trust_env=False)
        found = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise LinkError(f"{url} does not answer: {error}") from None
    if not isinstance(found, dict):
        raise LinkError(f"{url} answers no object")
    return found
