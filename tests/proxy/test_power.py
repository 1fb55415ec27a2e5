"""Power of the nodes, as far as they know it: in /nodes and /metrics, and nothing rather than 0 where they do not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from proxy import prefill_node
from tests.proxy.conftest import Stack, make_cluster, running, wait_until
from tests.proxy.fake_worker import FakeWorker
from transfer.energy import POWER_HEADER, Power
from transfer.messages import Status


@pytest.fixture
def fast_stack(hf_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    monkeypatch.setattr(prefill_node, "HEARTBEAT_S", 0.05)
    with running(make_cluster(hf_dir)) as stack:
        yield stack


def test_nodes_that_know_their_power_say_it(fast_stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    view = fast_stack.http.get("/nodes").json()
    assert view["prefill"]["power"] is None
    (status,) = [worker["status"] for worker in view["workers"].values()]
    assert (status["package_watts"], status["dram_watts"], status["power_of"]) == (None, None, "")
    assert "_watts{" not in fast_stack.http.get("/metrics").text

    plain = FakeWorker._status

    def with_power(worker: FakeWorker) -> Status:
        return msgspec.structs.replace(
            plain(worker), package_watts=95.5, dram_watts=12.25, power_of="package-1, dram-1"
        )

    monkeypatch.setattr(FakeWorker, "_status", with_power)
    said = Power(213.4, 'gpu 0, gpu "1"')
    fast_stack.prefill.health_headers = {POWER_HEADER: msgspec.json.encode(said).decode()}
    wait_until(lambda: (status := fast_stack.gateway.workers.any_status) and status.package_watts)
    wait_until(lambda: fast_stack.gateway.prefill.first.power == said)
    view = fast_stack.http.get("/nodes").json()
    assert view["prefill"]["power"] == {"watts": 213.4, "of": 'gpu 0, gpu "1"'}
    told = fast_stack.http.get("/metrics").text
    worker = next(iter(view["workers"]))
    assert f'isthmus_worker_package_watts{{worker="{worker}"}} 95.5' in told
    assert f'isthmus_worker_dram_watts{{worker="{worker}"}} 12.25' in told
    node = next(iter(view["prefill_nodes"]))
    assert f'isthmus_prefill_watts{{node="{node}",of="gpu 0, gpu \\"1\\""}} 213.4' in told


@pytest.mark.parametrize("header", ["", "213 W", '{"watts": "many", "of": "gpu"}', '{"watts": NaN, "of": "gpu"}'])
def test_a_power_that_nobody_understands_is_none(header: str) -> None:
    assert prefill_node._power(header) is None
