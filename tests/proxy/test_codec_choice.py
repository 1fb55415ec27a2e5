"""How a request's KV travels: what the client asks for, if the worker can take it."""

from __future__ import annotations

import pytest

from tests.proxy.conftest import Stack
from transfer.messages import Reserve


@pytest.mark.parametrize(("asked", "used"), [(None, "raw"), ("auto", "raw"), ("q8", "q8")])
def test_the_ledger_names_the_codec_that_was_used(stack: Stack, asked: str | None, used: str) -> None:
    assert stack.chat({"X-Isthmus-Codec": asked} if asked else None).status_code == 200
    (reserve,) = stack.worker.heard(Reserve)
    assert reserve.codec == used
    assert stack.entries()[0]["codec"] == used


def test_a_codec_that_this_worker_does_not_take_is_refused_by_name(stack: Stack) -> None:
    response = stack.chat({"X-Isthmus-Codec": "zstd"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "X-Isthmus-Codec"
    assert "raw, q8" in error["message"]
    assert not stack.worker.heard(Reserve)


@pytest.mark.parametrize("route", ["cpu", "gpu"])
def test_routes_without_a_transfer_do_not_care(stack: Stack, route: str) -> None:
    assert stack.chat({"X-Isthmus-Codec": "zstd", "X-Isthmus-Route": route}).status_code == 200
    assert stack.entries()[0]["codec"] is None
