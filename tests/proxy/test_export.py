"""A model whose KV is not exported is served whole, by either engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.proxy.conftest import SplitIsBest, Stack, make_cluster, running


@pytest.fixture
def whole(hf_dir: Path) -> Iterator[Stack]:
    cluster = make_cluster(hf_dir)
    cluster = msgspec.structs.replace(cluster, prefill=msgspec.structs.replace(cluster.prefill, export=False))
    with running(cluster) as stack:
        stack.gateway.dispatcher.planner.estimates = SplitIsBest()
        yield stack


def test_no_request_is_split(whole: Stack) -> None:
    for _ in range(3):
        assert whole.chat().status_code == 200
    assert {entry["route"] for entry in whole.entries()} <= {"gpu", "cpu"}
    for route in ("gpu", "cpu"):
        assert whole.chat(headers={"X-Isthmus-Route": route}).status_code == 200
    assert not any("kv_transfer_params" in body for body in whole.prefill.bodies)
    refused = whole.chat(headers={"X-Isthmus-Route": "split"})
    assert refused.status_code == 400
    assert "[prefill] export is false" in refused.json()["error"]["message"]
    whole.assert_idle()
