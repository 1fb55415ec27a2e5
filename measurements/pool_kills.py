"""kill -9 of decode workers in mid-stream, at random moments.

Whether every answer goes on with the right text, and whether anything in the pool is spoilt by it.
"""

from __future__ import annotations

import json as json_format
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec
import uvicorn
from rich.console import Console
from rich.table import Table

from isthmus.children import die_with_parent
from isthmus.pool import verify
from isthmus.ports import free_ports
from isthmus.up import START_DEADLINE_S, cluster_on_free_ports, with_keys
from measurements import result
from measurements.pool_stack import ANSWER_S, redis_server
from transfer.config import Cluster, Pair, dump
from transfer.errors import EngineError

# One is killed, one goes on, one starts again.
WORKERS, LEAST_WORKERS = 3, 2
MAX_TOKENS = 64
STORY = "Once upon a time, in a village by the sea, there lived an old fisherman who had never caught a fish. " * 12
# Prompts that come again and again; as many others are new, so that their blocks are being written at the kill.
KNOWN_PROMPTS = 4
# Where between two pieces of text the kill comes.
MOST_DELAY_S = 0.05
GRACE_S = 10.0

Sample = dict[str, Any]


def run(json: Path | None, kills: int) -> None:
    """Kill ``kills`` times; print a table and write ``json`` if given.

    Raises :class:`ConfigError` if ``json`` cannot be written or no Redis-protocol server is installed, and
    :class:`EngineError` if a worker does not start.
    """
    from isthmus.pair import default_pair

    environment = result.environment()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="isthmus-kills-") as temporary:
        folder = Path(temporary)
        with redis_server(folder) as url, Flock(default_pair(), folder, url) as flock:
            samples = []
            for sample in trials(flock, kills):
                samples.append(sample)
                console.print(f"kill {len(samples)} of {kills}: {told(sample)}", highlight=False)
        intact, corrupt = verify(folder / "blocks")
    summary = summarize(samples, flock.losses, intact, len(corrupt))
    if json is not None:
        result.write(json, "pool-kills", environment, samples, summary)
    Console().print(table(summary))


def trials(flock: Flock, kills: int) -> Iterator[Sample]:
    """Each kill: what was asked, where the kill came, and what became of the answer."""
    moments = random.Random(0)  # noqa: S311 - moments, not secrets
    known = [f"Part {part}. {STORY}" for part in range(KNOWN_PROMPTS)]
    texts = {prompt: "".join(flock.stream(prompt)) for prompt in known}
    for number in range(kills):
        prompt = known[number // 2 % KNOWN_PROMPTS] if number % 2 else f"Number {number}. {STORY}"
        pieces, delay_s = moments.randrange(1, MAX_TOKENS * 3 // 4), moments.uniform(0, MOST_DELAY_S)
        flock.await_workers(LEAST_WORKERS)
        answer = flock.stream(prompt)
        said = list(islice(answer, pieces))
        time.sleep(delay_s)
        killed = flock.kill_the_busy_one()
        began = time.monotonic()
        error = ""
        try:
            said += islice(answer, 1)
            gap_s = time.monotonic() - began
            said += answer
        except EngineError as failure:
            error, gap_s = str(failure), 0.0
        entry = flock.entry()
        flock.start(killed)
        if prompt not in texts:
            flock.await_workers(LEAST_WORKERS)
        expected = texts.get(prompt) or "".join(flock.stream(prompt))
        yield {
            "new": prompt not in texts,
            "pieces": pieces,
            "worker": killed,
            "status": entry["status"],
            "failed_over": entry["failed_over"],
            "error": error,
            "same": "".join(said) == expected,
            "prompt_tokens": entry["prompt_tokens"],
            "reused_tokens": entry["kv_reused_tokens"],
            "gap_s": gap_s,
        }


def summarize(samples: list[Sample], losses: Counter[str], intact: int, corrupt: int) -> dict[str, Any]:
    """Counts, and whether they are what issue 7 asks for. ``losses`` are blocks by what the workers said of them."""
    resumed = [sample for sample in samples if sample["failed_over"]]
    summary = {
        "kills": len(samples),
        "answers_ended_well": sum(sample["status"] == "ok" and not sample["error"] for sample in samples),
        "right_texts": sum(sample["same"] for sample in samples),
        "resumed": len(resumed),
        "resumed_with_blocks": sum(sample["reused_tokens"] > 0 for sample in resumed),
        "prompt_tokens": sum(sample["prompt_tokens"] for sample in resumed),
        "reused_tokens": sum(sample["reused_tokens"] for sample in resumed),
        "longest_gap_s": max((sample["gap_s"] for sample in samples), default=0.0),
        "intact_blocks": intact,
        "corrupt_blocks": corrupt,
        "dropped_blocks": losses["corrupt"],
        "torn_writes": losses["torn"],
    }
    right = summary["kills"] == summary["answers_ended_well"] == summary["right_texts"] and not corrupt
    return summary | {"pass": bool(right and intact)}


def table(summary: dict[str, Any]) -> Table:
    """The summary for people."""
    made = Table(title="kill -9 of a worker in mid-stream", title_justify="left", show_header=False)
    for name, value in summary.items():
        text = f"{value:.2f}" if isinstance(value, float) else str(value)
        made.add_row(name.replace("_", " "), {"True": "yes", "False": "NO"}.get(text, text))
    return made


def told(sample: Sample) -> str:
    """A line about one kill."""
    how = "right text" if sample["same"] else f"WRONG TEXT {sample['error']}"
    return f"{how}, {sample['reused_tokens']} of {sample['prompt_tokens']} tokens from the pool"


class Flock:
    """Entered: ``WORKERS`` workers on one host's disk pool and one server, behind a proxy in this process, no vLLM."""

    def __init__(self, pair: Pair, folder: Path, shared_pool_url: str) -> None:
        cluster = cluster_on_free_ports(pair)
        pool = {
            "pool_mib": 128,
            "disk_pool_dir": str(folder / "blocks"),
            "disk_pool_mib": 256,
            "shared_pool_url": shared_pool_url,
        }
        # A token a piece, on cells whose logits do not depend on where they lie.
        plain = {"cell_type": "bf16", "numa": "off", "speculate": "off", "threads": 1, "num_cells": 2048}
        decode = msgspec.structs.replace(cluster.decode, max_sequences=4, **plain, **pool)
        proxy = msgspec.structs.replace(cluster.proxy, parity_share=0.0)
        self.cluster: Cluster = with_keys(msgspec.structs.replace(cluster, decode=decode, proxy=proxy), folder / "keys")
        self.losses: Counter[str] = Counter()
        self._folder = folder
        self._exits = ExitStack()
        self._commands: dict[str, list[str]] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{cluster.proxy.port}", timeout=ANSWER_S, trust_env=False)

    def __enter__(self) -> Self:
        from proxy.app import create_app

        with ExitStack() as exits:
            exits.callback(self._http.close)
            app = create_app(self.cluster)
            self._gateway = app.state.gateway
            config = uvicorn.Config(app, port=self.cluster.proxy.port, log_level="error", ws="none")
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run)
            thread.start()
            exits.callback(thread.join)
            exits.callback(lambda: setattr(server, "should_exit", True))
            exits.callback(self._end)
            for index in range(WORKERS):
                self._prepare(index)
            self.await_workers(WORKERS)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def stream(self, prompt: str) -> Iterator[str]:
        """The texts of a greedy answer as they come; :class:`EngineError` where it ends with an error."""
        body = {"model": self.cluster.pair.name, "prompt": prompt, "max_tokens": MAX_TOKENS, "stream": True}
        body |= {"temperature": 0, "ignore_eos": True}
        with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                raise EngineError(f"the proxy answered {response.status_code}: {response.read().decode()[:500]}")
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    chunk = json_format.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise EngineError(f"an answer ended early: {chunk['error']}")
                    yield from (choice["text"] for choice in chunk["choices"])

    def entry(self) -> dict[str, Any]:
        """The last request's entry in the ledger."""
        return dict(self._http.get("/ledger?last=1").json()["entries"][0])

    def kill_the_busy_one(self) -> str:
        """SIGKILL to a worker that serves; returns its name. Where the answer has just ended, to any."""
        names = [node.name for node in self._gateway.workers if node.conversations and node.name in self._processes]
        name = names[0] if names else next(iter(self._processes))
        self._count_losses(name)
        process = self._processes.pop(name)
        process.kill()
        process.wait()
        return name

    def start(self, name: str) -> None:
        """Start the worker ``name``, and wait for nothing."""
        with (self._folder / f"{name.replace(':', '-')}.log").open("ab") as said:
            self._processes[name] = subprocess.Popen(  # noqa: S603 ours
                self._commands[name], stdout=said, stderr=said, preexec_fn=die_with_parent
            )

    def await_workers(self, count: int) -> None:
        """Wait until ``count`` workers that run take requests; :class:`EngineError` if one ends or none comes."""

        def there() -> bool:
            if ended := [name for name, process in self._processes.items() if process.poll() is not None]:
                log = self._folder / f"{ended[0].replace(':', '-')}.log"
                raise EngineError(f"worker {ended[0]} has ended:\n{log.read_text()[-2000:]}")
            nodes = self._gateway.workers.nodes
            ready: int = sum(name in nodes and nodes[name].takes_requests for name in self._processes)
            return ready >= count

        self._wait(there)

    def _prepare(self, index: int) -> None:
        names = ("control_port", "kv_port", "kv_control_port")
        ports = dict(zip(names, free_ports(len(names)), strict=True)) if index else {}
        decode = msgspec.structs.replace(self.cluster.decode, **ports)
        config = self._folder / f"worker-{index}.toml"
        config.write_bytes(dump(msgspec.structs.replace(self.cluster, decode=decode)))
        name = f"127.0.0.1:{decode.control_port}"
        self._commands[name] = [sys.executable, "-P", "-m", "isthmus", "decode", "--config", str(config)]
        self.start(name)

    def _count_losses(self, name: str) -> None:
        """Add what the worker has said since it was started: it is about to end."""
        status = self._gateway.workers.nodes[name].status
        for tier in status.tiers if status else ():
            self.losses["corrupt"] += tier.corrupt_blocks
            self.losses["torn"] += tier.refused.get("torn", 0)

    def _wait(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        while not what():
            if time.monotonic() > deadline:
                raise EngineError("the workers do not come up")
            time.sleep(0.05)

    def _end(self) -> None:
        for name, process in self._processes.items():
            if name in self._gateway.workers.nodes:
                self._count_losses(name)
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
