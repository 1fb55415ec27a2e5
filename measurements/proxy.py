"""What the proxy adds to talking to an engine, what a split loses, and whether `auto` finds the best route."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from isthmus.pair import default_pair
from isthmus.up import Stack, cluster_on_free_ports, with_keys
from measurements import result, targets
from measurements.load_generator import Ask, Generator, Request, Target
from measurements.proxy_fixed import FixedStack
from measurements.proxy_streams import measure as measure_streams
from measurements.proxy_summary import AUTO, DIRECT, FORCED, PROXIED, Sample, summarize
from measurements.proxy_targets import verdicts
from measurements.workloads import QUICK_WORKLOADS, Workload
from transfer.errors import EngineError

ROUTE_HEADER = "X-Isthmus-Route"
VLLM, FIXED = "vllm", "fixed"
STREAMS = 16
_DEADLINE_S = 280.0


class Profile(NamedTuple):
    """How much is asked in a round. ``tail_requests`` are for the 99th percentile of the time to first token.

    Workloads have ``workload_rounds``, with ``workload_requests`` one after the other, and ``STREAMS`` at once.
    """

    rounds: int
    workload_rounds: int
    tail_requests: int
    throughput_requests: int
    workload_requests: int
    idle_streams: int
    idle_seconds: float


QUICK = Profile(5, 1, 12, 32, 2, 200, 8.0)
FULL = Profile(5, 3, 100, 64, 4, 200, 20.0)

# Tokens in and out of a request: one whose time to first token is mostly overhead, and one that is mostly tokens.
TAIL_TOKENS = (32, 4)
THROUGHPUT_TOKENS = (32, 48)
SPLIT_TOKENS = (1000, 64)


def run(json: Path | None, plot: Path | None, profile: Profile) -> None:
    """Measure with the default pair on this host; print, write ``json`` and draw ``plot`` if given.

    Raises :class:`EngineError` if a node does not start or a request fails, and :class:`ConfigError` for files that
    cannot be written.
    """
    if plot is not None:
        # Fail before measuring, not after.
        import matplotlib as _  # noqa: F401
    environment = result.environment()
    console = Console(stderr=True)
    samples: list[Sample] = []
    with ExitStack() as exits, Progress(console=console) as progress:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-measure-")))
        generator = exits.enter_context(Generator(folder / "generator.log"))
        for name, part in (("a fixed pace", _against_fixed), ("vLLM and llama.cpp", _against_engines)):
            task = progress.add_task(f"against {name}", total=None)
            for sample in part(generator, folder, profile):
                samples.append(sample)
                progress.update(task, advance=1)
            progress.update(task, total=1, completed=1)
    summary = summarize(samples)
    summary["targets"] = [each._asdict() | {"passed": each.passed} for each in verdicts(summary)]
    if json is not None:
        result.write(json, "proxy", environment, samples, summary)
    if plot is not None:
        from measurements.proxy_plot import draw

        draw(summary, plot)
    for shown in tables(summary):
        Console().print(shown)


def _against_fixed(generator: Generator, folder: Path, profile: Profile) -> Iterator[Sample]:
    """An engine that takes the same time for everything: what differs is the proxy's."""
    pair = default_pair()
    with FixedStack(pair, folder) as stack:
        ways = {way: Target(url, pair.name, pair.hf_dir) for way, url in stack.urls.items()}
        yield from _overhead(FIXED, generator, folder, ways, profile)
        yield from measure_streams(stack, profile.idle_streams, profile.idle_seconds)


def _against_engines(generator: Generator, folder: Path, profile: Profile) -> Iterator[Sample]:
    """The whole stack with the default pair."""
    cluster = with_keys(cluster_on_free_ports(default_pair()), folder / "keys")
    logs = folder / "logs"
    logs.mkdir()
    with Stack(cluster, logs) as stack:
        pair = cluster.pair
        ways = {
            DIRECT: Target(f"http://127.0.0.1:{cluster.prefill.port}", pair.name, pair.hf_dir),
            PROXIED: Target(stack.proxy_url, pair.name, pair.hf_dir),
        }
        yield from _overhead(VLLM, generator, folder, ways, profile)
        yield from _split(generator, folder, ways, profile)
        yield from _workloads(generator, folder, ways[PROXIED], profile)


def _overhead(
    engine: str, generator: Generator, folder: Path, ways: dict[str, Target], profile: Profile
) -> Iterator[Sample]:
    """The same requests to the engine and through the proxy, one at a time and ``STREAMS`` at once, in turns.

    The first round is not counted.
    """
    for turn in range(profile.rounds + 1):
        for way in _rotated((DIRECT, PROXIED), turn):
            tail = Ask(profile.tail_requests if turn else 4, 1, *TAIL_TOKENS, seed=turn, headers=_forced("gpu"))
            found = generator.run(ways[way], tail, folder / "asked.json", _DEADLINE_S)
            if turn:
                ttft_s = [request.ttft_s for request in found]
                yield {"part": "ttft", "engine": engine, "way": way, "round": turn, "ttft_s": ttft_s}
        for way in _rotated((DIRECT, PROXIED), turn):
            many = profile.throughput_requests if turn else STREAMS
            load = Ask(many, STREAMS, *THROUGHPUT_TOKENS, seed=turn, headers=_forced("gpu"))
            found = generator.run(ways[way], load, folder / "asked.json", _DEADLINE_S)
            if turn:
                yield {
                    "part": "throughput",
                    "engine": engine,
                    "way": way,
                    "round": turn,
                    "tokens_per_s": _tokens_per_s(found),
                }


def _split(generator: Generator, folder: Path, ways: dict[str, Target], profile: Profile) -> Iterator[Sample]:
    """A prompt prefilled by vLLM alone, its answer decoded by the worker alone, and both by route ``split``.

    The worker's own route tells how long decoding takes: from its first token to its last.
    """
    prompt_tokens, output_tokens = SPLIT_TOKENS
    for turn in range(profile.rounds + 1):
        asks = {
            "prefill": (DIRECT, Ask(1, 1, prompt_tokens, 1, seed=3 * turn)),
            "cpu": (PROXIED, Ask(1, 1, prompt_tokens, output_tokens, seed=3 * turn + 1, headers=_forced("cpu"))),
            "split": (PROXIED, Ask(1, 1, prompt_tokens, output_tokens, seed=3 * turn + 2, headers=_forced("split"))),
        }
        sample: Sample = {"part": "split", "round": turn}
        for name in _rotated(tuple(asks), turn):
            way, ask = asks[name]
            (request,) = generator.run(ways[way], ask, folder / "asked.json", _DEADLINE_S)
            match name:
                case "prefill":
                    sample["prefill_s"] = request.e2e_s
                case "cpu":
                    sample["decode_s"] = request.e2e_s - request.ttft_s
                case _:
                    sample["e2e_s"], sample["ttft_s"] = request.e2e_s, request.ttft_s
        if turn:
            yield sample


def _workloads(generator: Generator, folder: Path, proxy: Target, profile: Profile) -> Iterator[Sample]:
    """Every workload by every forced route and by `auto`, which has learned from the rounds before.

    No two runs share a prompt, so that no route profits from what another has left in a cache.
    """
    loads = [(each, at) for each in QUICK_WORKLOADS for at in ((STREAMS,) if each.together else (1, STREAMS))]
    seed = 1000
    for turn in range(profile.workload_rounds + 1):
        for workload, at_once in loads:
            for route in _rotated((*FORCED, AUTO), turn):
                seed += 1
                requests = at_once if at_once > 1 else profile.workload_requests if turn else 1
                ask = _asked(workload, requests, at_once, route, seed)
                found = generator.run(proxy, ask, folder / "asked.json", _DEADLINE_S)
                if turn:
                    yield {
                        "part": "workload",
                        "workload": f"{workload.name}, {at_once} at once",
                        "route": route,
                        "round": turn,
                        "e2e_s": [request.e2e_s for request in found],
                        "ttft_s": [request.ttft_s for request in found],
                        "taken": _routes_taken(proxy, ask.requests),
                    }


def _asked(workload: Workload, requests: int, at_once: int, route: str, seed: int) -> Ask:
    return Ask(
        requests,
        at_once,
        workload.prompt_tokens,
        workload.output_tokens,
        workload.shared_tokens,
        seed,
        _forced(route),
    )


def _routes_taken(proxy: Target, requests: int) -> list[str]:
    """The routes of the newest requests, as the ledger has them."""
    try:
        answer = httpx.get(f"{proxy.url}/ledger?last={requests}", timeout=10, trust_env=False).raise_for_status()
    except httpx.HTTPError as error:
        raise EngineError(f"the proxy's ledger does not answer: {error}") from None
    return [str(entry["route"]) for entry in answer.json()["entries"]]


def _tokens_per_s(found: Sequence[Request]) -> float:
    began_s = min(request.began_s for request in found)
    ended_s = max(request.began_s + request.e2e_s for request in found)
    return sum(request.output_tokens for request in found) / (ended_s - began_s)


def _forced(route: str) -> tuple[str, ...]:
    return (f"{ROUTE_HEADER}={route}",)


def _rotated(ways: tuple[str, ...], turn: int) -> tuple[str, ...]:
    return ways[turn % len(ways) :] + ways[: turn % len(ways)]


def tables(summary: dict[str, Any]) -> list[Table]:
    """The summary for a terminal."""
    shown = Table(title="the proxy against talking to the engine directly", title_justify="left")
    for column in ("what", "vLLM", "fixed pace"):
        shown.add_column(column, justify="left" if column == "what" else "right")
    fixed = summary["fixed_engine"]
    for what, key in (
        ("time to first token, added at the median, ms", "added_ttft_ms_p50"),
        ("time to first token, added at the 99th percentile, ms", "added_ttft_ms_p99"),
        (f"throughput of {STREAMS} streams over direct", "throughput_vs_direct"),
    ):
        shown.add_row(what, f"{summary[key]:.2f}", f"{fixed[key]:.2f}")
    more = Table(title="streams, the split and the router", title_justify="left")
    more.add_column("what")
    more.add_column("", justify="right")
    idle, slow = summary["idle_streams"], summary["slow_reader"]
    more.add_row(f"{idle['streams']} idle streams on one core: errors", str(idle["errors"]))
    more.add_row("  late at the 99th percentile, ms", f"{idle['late_ms_p99']:.1f}")
    more.add_row("others' gaps beside a reader that does not read, over alone", f"{slow['gap_p99_ratio']:.2f}")
    more.add_row("split efficiency: (prefill + decode alone) / end to end", f"{summary['split_efficiency']:.2f}")
    return [shown, more, targets.table(verdicts(summary))]
