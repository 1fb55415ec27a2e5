"""The header of the prefill node's heartbeat, around an application that is not vLLM's."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import msgspec
import pytest

from gpu_prefill import power
from transfer import energy


async def app(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def headers_of(path: str, middleware: Any) -> httpx.Headers:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(middleware), base_url="http://node") as http:
            return await http.get(path)

    return asyncio.run(ask()).headers


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> energy.PowerMeter:
    """Of a counter that grows by 120 J every second."""
    joules, times_ns = iter(range(0, 10_000, 120)), iter(range(0, 10**12, 10**9))
    counters = [energy.Counter("gpu 0", None, 0.0, lambda: float(next(joules)))]
    made = energy.PowerMeter(counters, lambda: next(times_ns))
    monkeypatch.setattr(energy, "meter", lambda _found: made)
    return made


@pytest.mark.usefixtures("meter")
@pytest.mark.parametrize("on_cpu", [True, False])
def test_only_the_heartbeat_says_the_power(monkeypatch: pytest.MonkeyPatch, on_cpu: bool) -> None:
    monkeypatch.setattr(power, "runs_on_cpu", lambda: on_cpu)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    node = power.PowerHeader(app)
    assert energy.POWER_HEADER not in headers_of("/v1/completions", node)
    said = headers_of("/health", node)
    assert said["content-length"] == "0"
    assert msgspec.json.decode(said[energy.POWER_HEADER], type=energy.Power) == energy.Power(120.0, "gpu 0")


def test_nothing_is_said_where_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "runs_on_cpu", lambda: False)
    monkeypatch.setattr(energy, "gpus", lambda _visible: energy.Found((), "no driver"))
    node = power.PowerHeader(app)
    assert energy.POWER_HEADER not in headers_of("/health", node)
