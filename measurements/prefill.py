"""How fast vLLM prefills, by prompt length and cached prefix, and what exporting the KV costs it."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gpu_prefill import service
from gpu_prefill.geometry import read_geometry
from isthmus.children import Child, Children
from isthmus.pair import default_pair
from isthmus.ports import free_ports
from isthmus.progress import starting
from isthmus.up import GRACE_S, START_DEADLINE_S, cluster_on_free_ports, with_keys
from measurements import picture, result
from measurements.prefill_sink import Sink
from transfer.config import Cluster
from transfer.errors import EngineError

Sample = dict[str, Any]

PLAIN = "vLLM alone"
IDLE = "connector, nothing exported"
EXPORT = "connector, KV exported"
WAYS = (PLAIN, IDLE, EXPORT)
LENGTHS_TOKENS = (128, 900, 3500)
# Of a prompt of the middle length.
CACHED_TOKENS = (0, 256, 512, 768)
STAGES = ("gather_ns", "encode_ns", "kv_wire_bytes")
_CONNECTOR_FLAG = "--kv-transfer-config="
_REQUEST_S = 300.0


def run(json: Path | None, plot: Path | None, rounds: int, lengths_tokens: Sequence[int] = LENGTHS_TOKENS) -> None:
    """Measure with the default pair on two vLLM servers; print, write ``json`` and draw ``plot`` if given.

    Raises :class:`EngineError` if a server does not start or a prompt is not exported whole, and
    :class:`ConfigError` for files that cannot be written.
    """
    if plot is not None:
        # Fail before measuring, not after.
        import matplotlib as _  # noqa: F401
    environment = result.environment()
    with ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-measure-")))
        cluster = with_keys(cluster_on_free_ports(default_pair()), folder / "keys")
        ways = exits.enter_context(_Servers(cluster, folder))
        with Progress(console=Console(stderr=True)) as progress:
            total = rounds * (len(lengths_tokens) * len(WAYS) + len(CACHED_TOKENS))
            task = progress.add_task("prefill", total=total)
            samples = []
            for sample in measure(ways, rounds, lengths_tokens):
                samples.append(sample)
                progress.advance(task)
    summary = summarize(samples)
    if json is not None:
        result.write(json, "prefill", environment, samples, summary)
    if plot is not None:
        draw(summary, plot)
    for shown in tables(summary):
        Console().print(shown)


def measure(servers: _Servers, rounds: int, lengths_tokens: Sequence[int]) -> Iterator[Sample]:
    """Prompts of random tokens, each used once; the ways take turns, and the first round is not counted."""
    words = np.random.default_rng(0)

    def prompt(num_tokens: int) -> list[int]:
        return [int(token) for token in words.integers(100, servers.vocab_size - 100, num_tokens)]

    for turn in range(rounds + 1):
        for length in lengths_tokens:
            for way in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
                sample = servers.prefill(way, prompt(length))
                if turn:
                    yield {"part": "length", "way": way, "round": turn, "prompt_tokens": length, **sample}
        for cached in CACHED_TOKENS:
            whole = prompt(max(CACHED_TOKENS) + 128)
            if cached:
                servers.prefill(IDLE, whole[:cached])
            sample = servers.prefill(IDLE, whole)
            if turn:
                yield {"part": "cached", "way": IDLE, "round": turn, "prompt_tokens": len(whole), **sample}


class _Servers:
    """vLLM with our connector and without, and the place where exported KV lands."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster, self._folder = cluster, folder
        geometry = read_geometry(Path(cluster.pair.hf_dir))
        self.vocab_size = geometry.vocab_size
        self._sink = Sink(cluster, geometry)
        (port,) = free_ports(1)
        self._ports = {PLAIN: port, IDLE: cluster.prefill.port, EXPORT: cluster.prefill.port}
        self._http = httpx.Client(timeout=_REQUEST_S, trust_env=False)
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as exits:
            exits.callback(self._http.close)
            exits.callback(self._sink.close)
            children = [
                Child(name="connector", command=self._command(IDLE), is_healthy=self._healthy(IDLE)),
                Child(name="plain", command=self._command(PLAIN), is_healthy=self._healthy(PLAIN), after="connector"),
            ]
            running = exits.enter_context(
                Children(children, self._folder, start_deadline_s=START_DEADLINE_S, grace_s=GRACE_S)
            )
            with starting(Console(stderr=True)) as show:
                running.start(show)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def prefill(self, way: str, prompt: list[int]) -> Sample:
        """Prefill ``prompt`` by ``way``: seconds until vLLM's answer, cached tokens and, if exported, the stages."""
        body = {"model": self._cluster.pair.name, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        ticket = self._sink.expect(len(prompt)) if way == EXPORT else None
        if ticket is not None:
            body["kv_transfer_params"] = {"isthmus": msgspec.to_builtins(ticket)}
        began = time.monotonic_ns()
        answer = self._http.post(f"http://127.0.0.1:{self._ports[way]}/v1/completions", json=body)
        seconds = (time.monotonic_ns() - began) / 1e9
        if answer.is_error:
            raise EngineError(f"vLLM answered {answer.status_code}: {answer.text}")
        usage = answer.json()["usage"]
        cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        sample = {"seconds": seconds, "cached_tokens": cached_tokens}
        return sample | self._sink.stages() if ticket is not None else sample

    def _command(self, way: str) -> list[str]:
        argv, environment = service.command(self._cluster)
        if way == PLAIN:
            port = f"--port={self._cluster.prefill.port}"
            argv = [each for each in argv if not each.startswith(_CONNECTOR_FLAG)]
            argv[argv.index(port)] = f"--port={self._ports[PLAIN]}"
        added = [f"{name}={value}" for name, value in environment.items() if os.environ.get(name) != value]
        return ["env", *added, *argv]

    def _healthy(self, way: str) -> Callable[[], bool]:
        def ask() -> bool:
            try:
                return self._http.get(f"http://127.0.0.1:{self._ports[way]}/health", timeout=0.5).is_success
            except httpx.HTTPError:
                return False

        return ask


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """Medians by length and way, with ratios taken within a round; and seconds by cached tokens."""
    seconds = {(s["prompt_tokens"], s["way"], s["round"]): s["seconds"] for s in samples if s["part"] == "length"}
    lengths = sorted({length for length, _, _ in seconds})
    rounds = sorted({turn for _, _, turn in seconds})
    summary: dict[str, Any] = {"tokens_per_s": {}, "cached_prefix": {}, "stages": {}}
    for length in lengths:
        rates = {way: statistics.median(length / seconds[length, way, turn] for turn in rounds) for way in WAYS}
        summary["tokens_per_s"][str(length)] = rates
        for key, way in (("export_on_vs_off", EXPORT), ("connector_vs_none", IDLE)):
            ratios = [seconds[length, PLAIN, turn] / seconds[length, way, turn] for turn in rounds]
            summary[f"{key}_{length}"] = statistics.median(ratios)
            summary[f"{key}_{length}_spread"] = [min(ratios), max(ratios)]
        exported = [s for s in samples if s["part"] == "length" and s["way"] == EXPORT and s["prompt_tokens"] == length]
        summary["stages"][str(length)] = {
            stage: statistics.median(s[stage] for s in exported)
            for stage in ("gather_ns", "encode_ns", "kv_wire_bytes")
        }
    cached: dict[int, list[float]] = {}
    for sample in samples:
        if sample["part"] == "cached":
            cached.setdefault(sample["cached_tokens"], []).append(sample["seconds"])
    summary["cached_prefix"] = {str(tokens): statistics.median(found) for tokens, found in sorted(cached.items())}
    return summary


def tables(summary: dict[str, Any]) -> list[Table]:
    """The summary for a terminal."""
    shown = Table(title="prompt tokens a second, medians; ratios to vLLM alone", title_justify="left")
    for column in ("prompt", *WAYS, "exported / alone", "smallest", "largest"):
        shown.add_column(column, justify="right")
    for length, rates in summary["tokens_per_s"].items():
        spread = summary[f"export_on_vs_off_{length}_spread"]
        ratio = summary[f"export_on_vs_off_{length}"]
        shown.add_row(
            length, *(f"{rates[way]:,.0f}" for way in WAYS), f"{ratio:.3f}", *(f"{each:.3f}" for each in spread)
        )
    prefix = Table(title="seconds to the first token by cached prefix", title_justify="left")
    prefix.add_column("cached tokens", justify="right")
    prefix.add_column("seconds", justify="right")
    for tokens, median in summary["cached_prefix"].items():
        prefix.add_row(tokens, f"{median:.3f}")
    return [shown, prefix]


def draw(summary: dict[str, Any], path: Path) -> None:
    """Rates by length and way, as a picture in the format of ``path``'s name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    lengths = list(summary["tokens_per_s"])
    at = np.arange(len(lengths))
    for index, way in enumerate(WAYS):
        rates = [summary["tokens_per_s"][length][way] for length in lengths]
        axes.bar(at + 0.27 * (index - 1), rates, 0.25, label=way)
    axes.set_xticks(at, lengths)
    axes.set(xlabel="tokens of the prompt", ylabel="tokens a second", title="prefill in vLLM: medians")
    axes.legend()
    picture.save(figure, path)
