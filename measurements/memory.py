"""What the memory of each NUMA node gives to the cores beside it: what decoding on that node can hope for."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from cpu_decode import binding, numa
from measurements import bandwidth, result

Sample = dict[str, Any]


def run(json: Path | None, rounds: int) -> None:
    """Measure node after node, each from a process that is bound to it; print a table, write ``json`` if given.

    Raises :class:`ConfigError` where the kernel refuses to bind, and for files that cannot be written.
    """
    environment = result.environment()
    samples = measure(rounds)
    summary = summarize(samples)
    if json is not None:
        result.write(json, "memory", environment, samples, summary)
    Console().print(table(summary))


def measure(rounds: int) -> list[Sample]:
    """Samples of every node that can host a worker; of the whole host where there are not several."""
    nodes = numa.choose("auto", numa.read_topology())
    if not nodes:
        return list(_of_node(None, rounds))
    found: list[Sample] = []
    for node in nodes:
        # A new interpreter: threads of a library that are there already would stay unbound.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as bound:
            found += bound.submit(_bound, node, rounds).result()
    return found


def _bound(node: numa.Node, rounds: int) -> list[Sample]:
    binding.bind(node)
    return list(_of_node(node.number, rounds))


def _of_node(node: int | None, rounds: int) -> Iterator[Sample]:
    threads = len(numa.cores(os.sched_getaffinity(0)))
    for number in range(1, rounds + 1):
        yield {
            "node": node,
            "round": number,
            "threads": threads,
            "triad_gb_per_s": bandwidth.triad_gb_per_s(threads),
            "read_gb_per_s": bandwidth.read_gb_per_s(threads),
        }


def summarize(samples: list[Sample]) -> dict[str, Any]:
    """By node: threads, and the median and the best of both rates."""
    summary: dict[str, Any] = {}
    for sample in samples:
        name = "host" if sample["node"] is None else f"node {sample['node']}"
        of_node = [each for each in samples if each["node"] == sample["node"]]
        rates = ("triad_gb_per_s", "read_gb_per_s")
        summary[name] = {"threads": sample["threads"]} | {
            rate: {"median": median(each[rate] for each in of_node), "best": max(each[rate] for each in of_node)}
            for rate in rates
        }
    return summary


def table(summary: dict[str, Any]) -> Table:
    """For people."""
    made = Table(title="memory bandwidth, GB/s: median (best)", title_justify="left")
    for column in ("", "threads", "STREAM triad", "reading"):
        made.add_column(column)
    for name, about in summary.items():
        rates = (about["triad_gb_per_s"], about["read_gb_per_s"])
        made.add_row(name, str(about["threads"]), *(f"{rate['median']:.1f} ({rate['best']:.1f})" for rate in rates))
    return made
