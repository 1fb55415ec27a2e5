"""The cluster file against this host, and the nodes against each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import psutil

from cpu_decode import numa
from isthmus.checks.finding import Finding, gibibytes
from transfer.config import Cluster
from transfer.errors import GeometryError, IsthmusError
from transfer.geometry import NO_KV, KVGeometry, require_same
from transfer.messages import PROTOCOL

# Less free memory than this share of what is needed leaves nothing for the page cache and other processes.
_COMFORT = 1.1
_PIN = re.compile(r"^([\w.-]+)==([\w.]+)")


def memory(needed_bytes: int, nodes: Sequence[numa.Node], available_bytes: int) -> Iterator[Finding]:
    """Room for one worker with weights, cells and landing buffers on each of ``nodes``; without any, on the host."""
    why = "weights, cells and landing buffers; a worker that runs out is killed"
    fix = "lower num_cells or landing_mib in [decode], or take a smaller quantization"
    places = {f"memory of NUMA node {node.number}": node.available_bytes for node in nodes}
    for check, free_bytes in (places or {"memory": available_bytes}).items():
        seen = f"{gibibytes(free_bytes)} available, a worker needs {gibibytes(needed_bytes)}"
        if free_bytes < needed_bytes:
            yield Finding(check, "fail", seen, why, fix)
        elif free_bytes < needed_bytes * _COMFORT:
            yield Finding(check, "warn", seen, why, fix)
        else:
            yield Finding(check, "ok", seen, why)


def memory_of(cluster: Cluster) -> Iterator[Finding]:
    """The same for the worker of ``cluster`` on this host."""
    from cpu_decode.geometry import read_geometry
    from cpu_decode.service import needed_bytes
    from cpu_decode.unsplit import geometry_or_no_kv

    gguf = Path(cluster.pair.gguf)
    try:
        geometry = geometry_or_no_kv(lambda: read_geometry(gguf), export=cluster.prefill.export)
        needed = needed_bytes(gguf, geometry, cluster.decode)
        nodes = numa.choose(cluster.decode.numa, numa.read_topology())
    except IsthmusError as error:
        yield Finding("memory", "fail", str(error), "the decode worker reads the same files", "mend [pair] or [decode]")
    except ModuleNotFoundError as missing:
        yield Finding(
            "memory", "unknown", f"{missing.name} is not installed: no worker here", "only workers hold cells"
        )
    else:
        yield from memory(needed, nodes, psutil.virtual_memory().available)


def versions(pins: Sequence[str], installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """Engines whose version is not the one that this release was tested with. ``pins`` are requirements with ``==``."""
    why = "the connector and the state format lean on details of the engines' releases"
    for pin in pins:
        if (found := _PIN.match(pin)) and (version := installed(found[1])):
            if version == found[2]:
                yield Finding(f"version of {found[1]}", "ok", version, why)
            else:
                fix = f"pip install '{found[1]}=={found[2]}'"
                yield Finding(f"version of {found[1]}", "warn", f"{version}, tested with {found[2]}", why, fix)


def installed_version(distribution: str) -> str | None:
    """The version of ``distribution``, None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def fetch_nodes(cluster: Cluster) -> dict[str, Any] | str:
    """What the proxy says at ``/nodes``, or why it says nothing."""
    try:
        import httpx
    except ModuleNotFoundError:
        return "httpx is not installed here"
    try:
        answer = httpx.get(f"http://{cluster.proxy.host}:{cluster.proxy.port}/nodes", timeout=3, trust_env=False)
    except httpx.HTTPError as error:
        return f"the proxy does not answer at {cluster.proxy.host}:{cluster.proxy.port} ({type(error).__name__})"
    if answer.status_code != 200:
        return f"the proxy answers {answer.status_code}"
    view = answer.json()
    return view if isinstance(view, dict) else "the proxy's answer is none of ours"


def nodes(view: Mapping[str, Any] | str, ours: KVGeometry | None) -> Iterator[Finding]:
    """Whether every node is up and speaks this version's protocol about this host's model.

    ``view`` is the proxy's ``/nodes``, ``ours`` the geometry of the pair in this host's cluster file.
    """
    why = "a node that differs refuses to talk, request by request"
    if isinstance(view, str):
        yield Finding("other nodes", "unknown", view, why)
        return
    several = view.get("prefill_nodes") or {}
    named = {f"prefill node {name}": about for name, about in several.items()} if len(several) > 1 else {}
    for name, about in (named or {"prefill node": view.get("prefill") or {}}).items():
        yield _reachable(name, about, why)
    for worker, about in (view.get("workers") or {}).items():
        name = f"decode worker {worker}"
        yield _reachable(name, about, why)
        if welcome := about.get("welcome"):
            yield _same_protocol(name, welcome, why)
            if ours:
                yield _same_model(name, welcome, ours, why)


def _reachable(name: str, node: Mapping[str, Any], why: str) -> Finding:
    if node.get("up"):
        return Finding(name, "ok", "up", why)
    return Finding(name, "warn", f"down: {node.get('down_reason') or 'unknown'}", why, "look at that node's log")


def _same_protocol(name: str, welcome: Mapping[str, Any], why: str) -> Finding:
    theirs = welcome.get("protocol")
    if theirs == PROTOCOL:
        return Finding(f"protocol of {name}", "ok", str(theirs), why)
    fix = "install the same release of isthmus on every node"
    return Finding(f"protocol of {name}", "fail", f"{theirs}, this host speaks {PROTOCOL}", why, fix)


def _same_model(name: str, welcome: Mapping[str, Any], ours: KVGeometry, why: str) -> Finding:
    check, fix = f"model of {name}", "put the same [pair] into every node's cluster file (`isthmus pair check`)"
    try:
        theirs = msgspec.convert(welcome.get("geometry"), KVGeometry)
        if theirs == NO_KV:
            return Finding(check, "unknown", "served whole: nothing is known of its KV", why)
        require_same(ours, theirs)
    except GeometryError as error:
        return Finding(check, "fail", str(error), why, fix)
    except msgspec.ValidationError as error:
        return Finding(check, "fail", f"its geometry has another form: {error}", why, fix)
    return Finding(check, "ok", f"fingerprint {ours.model_fingerprint}", why)
