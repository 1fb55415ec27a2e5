"""`isthmus doctor` against a proxy that runs."""

from __future__ import annotations

from isthmus.checks import cluster
from tests.proxy.conftest import Stack


def test_what_a_proxy_says_of_its_nodes_is_understood(stack: Stack) -> None:
    view = cluster.fetch_nodes(stack.gateway.cluster)
    assert isinstance(view, dict)
    ours = next(iter(stack.gateway.workers)).welcome.geometry
    found = {finding.check: finding.level for finding in cluster.nodes(view, ours)}
    assert found.pop("prefill node") == "ok"
    assert sorted(name.split()[0] for name in found) == ["decode", "model", "protocol"]
    assert set(found.values()) == {"ok"}
