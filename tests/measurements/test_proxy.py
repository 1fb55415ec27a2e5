"""What samples of the proxy come to, and the engine of fixed pace behind a real proxy."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from measurements import proxy, proxy_streams
from measurements.proxy_fixed import FLOOD_TEXT, FixedStack, engine
from measurements.proxy_plot import draw
from measurements.proxy_summary import summarize
from measurements.proxy_targets import verdicts
from tests.conftest import ModelPair
from transfer.config import Pair


def overhead(engine: str, added_ms: float, ratio: float):
    for turn in (1, 2):
        for way, extra_ms, rate in (("direct", 0.0, 100.0), ("proxied", added_ms, 100.0 * ratio)):
            ttft_s = [(50 + turn + number / 100 + extra_ms) / 1e3 for number in range(100)]
            yield {"part": "ttft", "engine": engine, "way": way, "round": turn, "ttft_s": ttft_s}
            yield {"part": "throughput", "engine": engine, "way": way, "round": turn, "tokens_per_s": rate * turn}


def workload(name: str, **e2e_s: float):
    for turn in (1, 2):
        for route, seconds in e2e_s.items():
            taken = ["gpu", "gpu"] if route == "auto" else [route] * 2
            times = [seconds * turn, seconds * turn]
            yield {
                "part": "workload",
                "workload": name,
                "route": route,
                "round": turn,
                "e2e_s": times,
                "ttft_s": times,
                "taken": taken,
            }


SAMPLES = [
    *overhead("vllm", 3.0, 0.97),
    *overhead("fixed", 1.5, 1.0),
    {"part": "idle", "streams": 200, "errors": 1, "late_ms": [0.0] * 99 + [10.0]},
    *(
        {"part": "slow reader", "beside": beside, "round": 0, "errors": 0, "gaps_ms": [gap] * 10}
        for beside, gap in ((True, 22.0), (False, 20.0))
    ),
    {"part": "split", "round": 1, "prefill_s": 1.0, "decode_s": 0.9, "e2e_s": 2.0, "ttft_s": 1.1},
    {"part": "split", "round": 2, "prefill_s": 1.1, "decode_s": 0.9, "e2e_s": 2.0, "ttft_s": 1.1},
    *workload("short chat", split=1.0, gpu=2.0, cpu=3.0, auto=1.2),
    *workload("burst", split=5.0, gpu=4.0, cpu=6.0, auto=4.0),
]


def test_the_summary():
    summary = summarize(SAMPLES)
    assert summary["added_ttft_ms_p50"] == pytest.approx(3.0)
    assert summary["added_ttft_ms_p99"] == pytest.approx(3.0)
    assert summary["throughput_vs_direct"] == pytest.approx(0.97)
    assert summary["fixed_engine"]["added_ttft_ms_p50"] == pytest.approx(1.5)
    assert summary["idle_streams"]["errors"] == 1
    assert summary["slow_reader"]["gap_p99_ratio"] == pytest.approx(1.1)
    assert summary["split_efficiency"] == pytest.approx(0.975)
    assert summary["auto_vs_best"] == pytest.approx({"short chat": 1.2, "burst": 1.0})
    assert summary["workloads"]["burst"]["best"] == "gpu"
    assert summary["workloads"]["burst"]["auto_took"] == {"gpu": 4}
    json.dumps(summary, allow_nan=False)


def test_tables_and_picture(tmp_path):
    summary = summarize(SAMPLES)
    rows = [cell for table in proxy.tables(summary) for column in table.columns for cell in column.cells]
    assert "auto over the best route, burst" in rows
    assert {each.figure: each.passed for each in verdicts(summary)} == {
        "added TTFT to vLLM, ms, p50": True,
        "added TTFT to vLLM, ms, p99": True,
        "throughput over vLLM": False,
        "added TTFT to a fixed pace, ms, p50": True,
        "added TTFT to a fixed pace, ms, p99": True,
        "throughput over a fixed pace": True,
        "errors of 200 idle streams": False,
        "errors beside a slow reader": True,
        "gaps beside a slow reader over alone, p99": True,
        "split efficiency": True,
        "auto over the best route, short chat": False,
        "auto over the best route, burst": True,
    }
    draw(summary, tmp_path / "proxy.png")
    assert (tmp_path / "proxy.png").stat().st_size > 1000


def test_the_engine_speaks_as_vllm_does():
    async def ask() -> list[str]:
        transport = httpx.ASGITransport(engine)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as http:
            assert (await http.get("/health")).status_code == 200
            assert (await http.get("/tokenize")).status_code == 404
            body = {"prompt": [1, 2], "max_tokens": 2, "seed": 1}
            return (await http.post("/v1/completions", json=body)).text.split("\n\n")

    first, second, counts, done, rest = asyncio.run(ask())
    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == FLOOD_TEXT
    assert json.loads(second.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert json.loads(counts.removeprefix("data: "))["usage"]["completion_tokens"] == 2
    assert (done, rest) == ("data: [DONE]", "")


@pytest.mark.engines
def test_streams_through_a_real_proxy_beside_one_that_does_not_read(default_pair: ModelPair, tmp_path, monkeypatch):
    monkeypatch.setattr(proxy_streams, "ROUNDS", 1)
    pair = Pair(name=default_pair.name, hf_dir=str(default_pair.hf_dir), gguf=str(default_pair.gguf))
    with FixedStack(pair, tmp_path) as stack:
        idle, alone, beside = proxy_streams.measure(stack, 20, 1.0)
    assert [sample["errors"] for sample in (idle, alone, beside)] == [0, 0, 0]
    assert len(idle["late_ms"]) == 20
    assert (alone["beside"], beside["beside"]) == (False, True)
