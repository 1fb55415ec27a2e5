"""vLLM and a proxy that stay, and a worker that is started again and again, each time with another pool."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx
import msgspec
from rich.console import Console

from isthmus.children import Child, Children, die_with_parent
from isthmus.progress import starting
from isthmus.up import GRACE_S, START_DEADLINE_S, cluster_on_free_ports, with_keys
from transfer.config import Cluster, Pair, dump
from transfer.errors import ConfigError, EngineError

ANSWER_S = 300.0
MAX_MODEL_LEN = 6144
START_S = 20.0
# Workers say every second what they hold.
QUIET_S = 2.5


class Answer(NamedTuple):
    """What a client saw of a streamed answer, and its ledger entry."""

    ttft_s: float
    text: str
    entry: dict[str, Any]


class PoolStack:
    """Entered, vLLM and the proxy are healthy, on bf16 cells, whose logits do not depend on where they lie.

    Raises :class:`EngineError` with the last words of a node that does not start.
    """

    def __init__(self, pair: Pair, folder: Path, console: Console) -> None:
        cluster = cluster_on_free_ports(pair)
        cluster = msgspec.structs.replace(
            cluster,
            prefill=msgspec.structs.replace(cluster.prefill, max_model_len=MAX_MODEL_LEN),
            decode=msgspec.structs.replace(cluster.decode, cell_type="bf16", numa="off"),
            proxy=msgspec.structs.replace(cluster.proxy, registry_port=0, parity_share=0.0),
        )
        self.cluster = with_keys(cluster, folder / "keys")
        self._folder = folder
        self._console = console
        self._url = f"http://127.0.0.1:{cluster.proxy.port}"
        self._http = httpx.Client(base_url=self._url, timeout=ANSWER_S, trust_env=False)
        self._exits = ExitStack()
        self._asked = self._started = 0

    def __enter__(self) -> Self:
        with ExitStack() as exits:
            exits.callback(self._http.close)
            config = self._write(self.cluster, "stack")
            children = [
                Child(name="prefill", command=_isthmus("prefill", config), is_healthy=self._prefill_up),
                Child(
                    name="proxy", command=_isthmus("proxy", config), is_healthy=lambda: bool(self._get("health/live"))
                ),
            ]
            running = exits.enter_context(
                Children(children, self._folder, start_deadline_s=START_DEADLINE_S, grace_s=GRACE_S)
            )
            with starting(self._console) as show:
                running.start(show)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    @contextmanager
    def worker(self, **pool: Any) -> Iterator[subprocess.Popen[bytes]]:
        """A worker with ``pool``, keys of ``[decode]``, for the body; the proxy knows it when the body begins."""
        self._started += 1
        decode = msgspec.structs.replace(self.cluster.decode, **pool)
        config = self._write(msgspec.structs.replace(self.cluster, decode=decode), f"worker-{self._started}")
        with (self._folder / f"worker-{self._started}.log").open("wb") as said:
            process = subprocess.Popen(  # noqa: S603 ours
                _isthmus("decode", config), stdout=said, stderr=said, preexec_fn=die_with_parent
            )
            try:
                self._wait(lambda: bool(self._status()), process, said.name)
                yield process
            finally:
                process.terminate()
                try:
                    process.wait(GRACE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        deadline = time.monotonic() + START_S
        while self._status() and time.monotonic() < deadline:
            time.sleep(0.1)

    def tokenize(self, text: str) -> list[int]:
        """The tokens of ``text``."""
        answer = self._http.post("/tokenize", json={"model": self.cluster.pair.name, "prompt": text})
        if answer.is_error:
            raise EngineError(f"the proxy does not tokenize: {answer.text[:500]}")
        return [int(token) for token in answer.json()["tokens"]]

    def ask(self, prompt: list[int] | str, max_tokens: int, route: str, *, alone: bool = False) -> Answer:
        """A greedy answer by ``route``, to its last token; ``alone``, the worker samples the first one by itself."""
        with self.asking(prompt, max_tokens, route, alone=alone) as texts:
            began = time.monotonic_ns()
            text = next(texts)
            ttft_s = (time.monotonic_ns() - began) / 1e9
            text += "".join(texts)
        return Answer(ttft_s, text, self._entry(f"pool-{self._asked}"))

    @contextmanager
    def asking(
        self, prompt: list[int] | str, max_tokens: int, route: str, *, alone: bool = False
    ) -> Iterator[Iterator[str]]:
        """The texts of an answer as they come; leaving the body gives it up. Nothing is sent before the first one."""
        self._asked += 1
        body = {"model": self.cluster.pair.name, "prompt": prompt, "max_tokens": max_tokens, "stream": True}
        # vLLM's first token is of other weights than the worker's; a seed has the worker draw it, from one candidate.
        body |= {"ignore_eos": True} | ({"temperature": 1, "top_k": 1, "seed": 1} if alone else {"temperature": 0})
        headers = {"X-Isthmus-Route": route, "X-Request-Id": f"pool-{self._asked}"}
        with ExitStack() as opened:

            def texts() -> Iterator[str]:
                response = opened.enter_context(
                    self._http.stream("POST", "/v1/completions", json=body, headers=headers)
                )
                if response.status_code != httpx.codes.OK:
                    raise EngineError(f"the proxy answered {response.status_code}: {response.read().decode()[:500]}")
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line.removeprefix("data: "))
                        if "error" in chunk:
                            raise EngineError(f"an answer ended early: {chunk['error']}")
                        yield from (choice["text"] for choice in chunk["choices"])

            yield texts()

    def tiers(self) -> dict[str, dict[str, Any]]:
        """What the worker last said of each of its tiers."""
        status = self._status()
        return {tier["name"]: tier for tier in status["tiers"]} if status else {}

    def settle(self, tier: str, num_blocks: int) -> None:
        """Wait until ``tier`` holds ``num_blocks``: writing goes on behind the answers."""
        deadline = time.monotonic() + START_S
        while self.tiers().get(tier, {}).get("blocks", 0) < num_blocks:
            if time.monotonic() > deadline:
                raise EngineError(f"tier {tier} does not hold {num_blocks} blocks: {self.tiers().get(tier)}")
            time.sleep(0.2)

    def settled_tiers(self) -> dict[str, dict[str, Any]]:
        """The same as :meth:`tiers` once nothing has been written for ``QUIET_S``."""
        found, since, deadline = self.tiers(), time.monotonic(), time.monotonic() + START_S
        while time.monotonic() < min(since + QUIET_S, deadline):
            time.sleep(0.2)
            now = self.tiers()
            if [tier["blocks"] for tier in now.values()] != [tier["blocks"] for tier in found.values()]:
                found, since = now, time.monotonic()
        return found

    def _entry(self, request_id: str) -> dict[str, Any]:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            entries = (self._get("ledger?last=5") or {}).get("entries", [])
            for entry in entries:
                if entry["request_id"] == request_id:
                    return dict(entry)
            time.sleep(0.02)
        raise EngineError(f"request {request_id} is not in the ledger")

    def _status(self) -> dict[str, Any] | None:
        view = (self._get("nodes") or {}).get("decode")
        return view["status"] if view and view["up"] else None

    def _wait(self, what: Any, process: subprocess.Popen[bytes], log: str) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        while not what():
            if process.poll() is not None or time.monotonic() > deadline:
                raise EngineError(f"the worker does not start:\n{Path(log).read_text()[-2000:]}")
            time.sleep(0.1)

    def _prefill_up(self) -> bool:
        try:
            url = f"http://127.0.0.1:{self.cluster.prefill.port}/health"
            return self._http.get(url, timeout=0.5).is_success
        except httpx.HTTPError:
            return False

    def _get(self, path: str) -> dict[str, Any] | None:
        try:
            answer = self._http.get(f"/{path}", timeout=5.0)
        except httpx.HTTPError:
            return None
        return dict(answer.json()) if answer.is_success else None

    def _write(self, cluster: Cluster, name: str) -> Path:
        path = self._folder / f"{name}.toml"
        path.write_bytes(dump(cluster))
        return path


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """A Redis or Valkey server of its own for the body; its URL. :class:`ConfigError` where none is installed."""
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        raise ConfigError("the shared tier needs redis-server or valkey-server; install one of them")
    path = folder / "redis.sock"
    command = [
        program,
        "--port",
        "0",
        "--unixsocket",
        str(path),
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        str(folder),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent)  # noqa: S603 ours
    try:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(path)) == 0:
                    break
            time.sleep(0.05)
        yield f"unix://{path}"
    finally:
        process.kill()
        process.wait()


def _isthmus(command: str, config: Path) -> list[str]:
    return [sys.executable, "-P", "-m", "isthmus", command, "--config", str(config)]
