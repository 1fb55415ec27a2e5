"""``isthmus doctor``: what on this host ruins results, and how to mend it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cpu_decode import numa
from isthmus.checks import cluster as cluster_checks
from isthmus.checks import kernel, network, processor
from isthmus.checks.finding import Finding
from transfer.config import Cluster
from transfer.errors import IsthmusError
from transfer.geometry import KVGeometry

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "unknown": "dim"}
ROOT = Path("/")


def run(cluster: Cluster | None, peer: str | None, as_json: bool, alone: bool = False) -> bool:
    """Check, print a table or JSON, and say whether nothing failed.

    Without ``cluster`` only the host is looked at; ``alone``, the other nodes are not asked. Raises
    :class:`ConfigError` if ``peer`` cannot be resolved.
    """
    findings = [*host(cluster)]
    if peer:
        findings.append(network.path_mtu(peer))
    if cluster:
        findings += cluster_file(cluster)
        if not alone:
            findings += cluster_checks.nodes(cluster_checks.fetch_nodes(cluster), _geometry(cluster))
    if as_json:
        print(json.dumps({"findings": [finding._asdict() for finding in findings]}, indent=1))  # noqa: T201
    else:
        Console().print(table(findings))
    return all(finding.level != "fail" for finding in findings)


def host(cluster: Cluster | None) -> Iterator[Finding]:
    """What can be said of the host alone; ``cluster`` says how large the weights are, and what is wanted of them."""
    locked_bytes = Path(cluster.pair.gguf).stat().st_size if cluster and cluster.decode.mlock else 0
    yield kernel.numa_balancing(ROOT)
    yield processor.governor(ROOT)
    yield processor.smt(ROOT, cluster.decode.threads if cluster else 0, _cores_of_a_worker())
    yield kernel.huge_pages(ROOT)
    yield kernel.locked_memory(ROOT, locked_bytes)
    yield kernel.swap(ROOT)
    yield kernel.clock_source(ROOT)
    yield processor.throttling(ROOT)
    yield processor.load(os.getloadavg()[0], processor.busiest_processes())
    yield from network.interfaces(ROOT)
    yield from network.rings(ROOT)
    yield from cluster_checks.versions(metadata.requires("isthmus") or [], cluster_checks.installed_version)


def cluster_file(cluster: Cluster) -> Iterator[Finding]:
    """What ``cluster`` asks of this host."""
    addresses = {
        "[prefill] port": (cluster.prefill.host, cluster.prefill.port),
        "[decode] control_port": (cluster.decode.host, cluster.decode.control_port),
        "[decode] kv_port": (cluster.decode.host, cluster.decode.kv_port),
        "[decode] kv_control_port": (cluster.decode.host, cluster.decode.kv_control_port),
        "[proxy] port": (cluster.proxy.host, cluster.proxy.port),
        "[proxy] registry_port": (cluster.proxy.host, cluster.proxy.registry_port),
    }
    found = list(network.ports({key: address for key, address in addresses.items() if address[1]}))
    yield from found
    # A worker that runs has taken its memory already.
    if not any(each.check.endswith("control_port)") and each.seen != "free" for each in found):
        yield from cluster_checks.memory_of(cluster)


def table(findings: list[Finding]) -> Table:
    """For people: below what was seen stands why it matters and the fix, where there is something to mend."""
    made = Table(title="what this host does to results", title_justify="left")
    for column in ("check", "", "seen"):
        made.add_column(column)
    for finding in findings:
        # Fixes may have the brackets of rich's markup in them.
        lines = [escape(finding.seen)]
        if finding.level in ("warn", "fail"):
            lines += [f"[dim]{escape(finding.why)}[/]", f"[bold]fix:[/] {escape(finding.fix)}"]
        made.add_row(escape(finding.check), f"[{_STYLES[finding.level]}]{finding.level}[/]", "\n".join(lines))
    return made


def _cores_of_a_worker() -> int:
    nodes = [node for node in numa.read_topology() if node.hosts_workers]
    return max((len(node.cores) for node in nodes), default=len(numa.cores(os.sched_getaffinity(0))))


def _geometry(cluster: Cluster) -> KVGeometry | None:
    from gpu_prefill.geometry import read_geometry

    try:
        return read_geometry(Path(cluster.pair.hf_dir))
    except IsthmusError:
        return None
