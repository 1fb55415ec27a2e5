"""The same question by every route, interleaved, and the medians side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from isthmus.ask import Answer, ask, request_body
from isthmus.ledger_table import milliseconds
from isthmus.up import Stack

ROUTES = ("split", "gpu", "cpu")


def compare_routes(stack: Stack, question: str, model: str, *, runs: int, max_tokens: int) -> None:
    """Ask ``runs`` times by each route, after one warm-up each, and print what came out.

    Every answer has exactly ``max_tokens`` tokens, so that no route wins by saying less. The order of routes shifts
    by one each round, so that each of them goes first now and then.
    """
    body = request_body(model, question, max_tokens=max_tokens, ignore_eos=True)
    answers: dict[str, list[Answer]] = {route: [] for route in ROUTES}
    console = Console(stderr=True)
    for route in ROUTES:
        ask(stack.proxy_url, body, route=route, on_text=_ignore)
    for run in range(runs):
        for turn in range(len(ROUTES)):
            route = ROUTES[(run + turn) % len(ROUTES)]
            stack.require_alive()
            answer = ask(stack.proxy_url, body, route=route, on_text=_ignore)
            answers[route].append(answer)
            console.print(f"run {run + 1} of {runs}, {route}: {milliseconds(answer.total_ns)}", highlight=False)
    printed = Console()
    printed.print(comparison_table(answers))
    printed.print(verdict(answers), highlight=False)


def comparison_table(answers: dict[str, list[Answer]]) -> Table:
    """Medians of each route, with the smallest and largest sample."""
    runs = len(next(iter(answers.values())))
    table = Table(title=f"medians of {runs} (smallest to largest)", title_justify="left")
    table.add_column("route")
    for title in ("time to first token", "time per output token", "end to end", "tokens"):
        table.add_column(title, justify="right")
    for route, samples in answers.items():
        tokens = sorted({answer.completion_tokens for answer in samples})
        table.add_row(
            route,
            _spread([answer.ttft_ns for answer in samples]),
            _spread([answer.tpot_ns for answer in samples]),
            _spread([answer.total_ns for answer in samples]),
            ", ".join(map(str, tokens)),
        )
    return table


def verdict(answers: dict[str, list[Answer]]) -> str:
    """Which route was fastest end to end, by how much, and whether the samples overlap with the next one's."""
    totals = {route: [answer.total_ns for answer in samples] for route, samples in answers.items()}
    first, *others = sorted(totals, key=lambda route: statistics.median(totals[route]))
    best_ns = statistics.median(totals[first])
    against = ", ".join(f"{statistics.median(totals[other]) / best_ns:.2f} times {other}'s speed" for other in others)
    clear = max(totals[first]) < min(totals[others[0]])
    doubt = "" if clear else f" Some runs of {others[0]} were as fast, so ask again with more --runs."
    return f"{first} was the fastest end to end on this machine: {against}.{doubt}"


def _spread(samples: Sequence[float]) -> str:
    return f"{milliseconds(statistics.median(samples))} ({min(samples) / 1e6:,.0f} to {max(samples) / 1e6:,.0f})"


def _ignore(_: str) -> None:
    pass
