"""Estimates that start from result files: the committed ones, as if they had been made here."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

import measurements
from proxy import measured, result_files
from proxy.estimates import Estimates
from proxy.measured import Measured, read
from tests.proxy.conftest import make_cluster, running
from transfer.config import Cluster, Decode, Pair, Prefill, load

RESULTS = Path(measurements.__file__).parent / "results"
FILES = ("prefill", "crossover", "codec", "link")
CONFIG = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
DECODE = {
    "samples": [{"what": "memory", "context_tokens": 900}],
    "summary": {"tokens_per_s": {"isthmus": {"1": 100.0, "4": 200.0}, "llama-server": {"1": 1.0}}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The committed results, of a machine like this one."""
    for name in FILES:
        envelope = json.loads((RESULTS / f"{name}.json").read_text())
        save(tmp_path, name, envelope | {"environment": here()})
    return tmp_path


def here() -> dict[str, Any]:
    gpu = ["one"] if Path("/proc/driver/nvidia/version").exists() else []
    return {"cpu": {"model": result_files.cpu_model(), "logical_cores": os.cpu_count()}, "gpu": gpu}


def save(folder: Path, measure: str, envelope: dict[str, Any]) -> None:
    (folder / f"{measure}.json").write_text(json.dumps(envelope))


def change(folder: Path, name: str, **fields: Any) -> None:
    save(folder, name, json.loads((folder / f"{name}.json").read_text()) | fields)


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    hf_dir = tmp_path_factory.mktemp("hf")
    (hf_dir / "config.json").write_text(json.dumps(CONFIG))
    return Cluster(pair=Pair(name=measured.DEFAULT_MODEL, hf_dir=str(hf_dir), gguf="/models/small.gguf"))


def test_the_committed_results(folder, cluster):
    found = read(folder, cluster)
    summary = json.loads((RESULTS / "prefill.json").read_text())["summary"]["tokens_per_s"]
    assert [seen.terms for seen in found.vllm_prefill] == [(128, 1), (900, 1), (3500, 1)]
    rate = summary["900"]["connector, KV exported"]
    assert found.vllm_prefill[1].took_ns == pytest.approx(900 / rate * 1e9)
    loopback = json.loads((RESULTS / "link.json").read_text())["summary"]["loopback"]["raw"]["gb_per_s"]["median"]
    assert found.link_bytes_per_s == pytest.approx(loopback * 1e9)
    assert (1, 1, 76) in [seen.terms for seen in found.vllm_step]
    assert {"raw", "lz4", "q8"} <= set(found.codecs)
    assert found.codecs["raw"].ratio == 1
    # A small model's KV hides behind its prefill: what shows is the last frame.
    assert all(0 < seen.took_ns < 50e6 for seen in found.codecs["raw"].exposed)


def test_what_a_slow_link_cannot_hide_shows(folder, cluster):
    change(folder, "link", summary={"loopback": {"raw": {"gb_per_s": {"median": 0.01}}}})
    found = read(folder, cluster)
    raw, q8 = found.codecs["raw"].exposed[2], found.codecs["q8"].exposed[2]
    # 3,500 tokens of 23,040 bytes at 10 MB/s, less the 5.6 s of their prefill; and the last frame.
    assert raw.took_ns == pytest.approx((3500 * 23040 / 1e7 - 5.626 + 0.4) * 1e9, rel=0.05)
    assert q8.took_ns < raw.took_ns / 4


def test_decode_json(folder, cluster):
    own = {"schema": result_files.SCHEMA, "measure": "decode", "environment": here(), **DECODE}
    save(folder, "decode", own)
    assert [each.terms for each in read(folder, cluster).worker_step] == [(1, 1, 900), (1, 4, 3600)]
    assert [each.took_ns for each in read(folder, cluster).worker_step] == [10_000_000, 20_000_000]
    save(folder, "decode", own | {"command": ["isthmus", "measure", "decode", "--gguf", "elsewhere/small.gguf"]})
    assert read(folder, cluster).worker_step[0].terms == (1, 1, 900)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"schema": "isthmus.measure/2"}, "isthmus.measure/2"),
        ({"measure": "link"}, "of link"),
        ({"environment": {"cpu": {"model": "Other", "logical_cores": 96}}}, "96 cores of Other"),
        ({"summary": {}}, "tokens_per_s"),
        ({"summary": {"tokens_per_s": {"128": {"vLLM alone": 5.0}}}}, "connector, KV exported"),
        ({"summary": {"tokens_per_s": {"128": {"connector, KV exported": 0}}}}, "> 0"),
        ({"summary": {"tokens_per_s": {"many": {"connector, KV exported": 1.0}}}}, "many"),
    ],
)
def test_a_file_that_does_not_fit_is_left_out_with_one_line(folder, cluster, fields, why):
    change(folder, "prefill", **fields)
    with capture_logs() as said:
        found = read(folder, cluster)
    warnings = [line for line in said if line["log_level"] == "warning"]
    assert len(warnings) == 1
    assert why in warnings[0]["reason"]
    # The other files still count.
    assert [seen.terms for seen in found.vllm_prefill] != [(128, 1), (900, 1), (3500, 1)]
    assert found.link_bytes_per_s


def test_results_of_another_model_are_left_out(folder, cluster):
    other = Cluster(pair=Pair(name="other", hf_dir=cluster.pair.hf_dir, gguf="other.gguf"))
    save(folder, "decode", {"schema": result_files.SCHEMA, "measure": "decode", "environment": here(), **DECODE})
    with capture_logs() as said:
        found = read(folder, other)
    assert sum(line["log_level"] == "warning" for line in said) == 3
    assert found._replace(codecs={}, link_bytes_per_s=None) == Measured()


def test_a_broken_file_and_a_folder_that_is_not_there(folder, cluster):
    (folder / "link.json").write_text("{")
    with capture_logs() as said:
        assert read(folder, cluster).link_bytes_per_s is None
        assert read(folder / "nowhere", cluster) == Measured()
    assert sum(line["log_level"] == "warning" for line in said) == 2


def test_a_worker_on_another_host_is_reached_by_the_measured_path(folder, cluster):
    there = Cluster(pair=cluster.pair, prefill=Prefill(host="10.0.0.1"), decode=Decode(host="10.0.0.2"))
    change(folder, "prefill", environment={"cpu": {"model": "Xeon", "logical_cores": 48}, "gpu": ["RTX"]})
    rates = {"raw": {"gb_per_s": {"median": 1.2}}}
    change(folder, "link", summary={"path": rates})
    found = read(folder, there)
    assert found.link_bytes_per_s == pytest.approx(1.2e9)
    assert len(found.vllm_prefill) == 3


def test_estimates_say_where_they_come_from(folder, cluster):
    estimates = Estimates()
    estimates.start(read(folder, cluster))
    step = estimates.worker_step("new", None, alone=True)
    assert step.basis == "measured"
    assert estimates.vllm_prefill("new").at(900, 1) == pytest.approx(0.88e9, rel=0.3)
    estimates.vllm("new").prefill.observe(10**9, 900, 1)
    assert estimates.vllm_prefill("new").basis == "learned"


def test_the_first_requests_need_not_try_the_routes(folder, hf_dir, monkeypatch, tmp_path_factory):
    pair = tmp_path_factory.mktemp("pair") / "hf"
    shutil.copytree(hf_dir, pair)
    (pair / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr(measured, "DEFAULT_MODEL", "tiny")
    crossover = json.loads((folder / "crossover.json").read_text())
    change(folder, "crossover", summary=crossover["summary"] | {"stack": {"model": "tiny"}})
    with running(make_cluster(pair, measurements=str(folder))) as stack:
        for _ in range(3):
            assert stack.chat().status_code == 200
        first = stack.entries()[0]
        assert {entry["reason"] for entry in stack.entries()} == {"min_e2e"}
        assert set(first["predicted"]) == {"split", "gpu", "cpu"}
        basis = stack.http.get("/nodes").json()
    assert "measured" in json.dumps(basis)


def test_the_folder_is_relative_to_the_cluster_file(tmp_path):
    file = tmp_path / "isthmus.toml"
    pair = f'[pair]\nname = "a"\nhf_dir = "."\ngguf = "{file.name}"\n'
    file.write_text(f'{pair}[proxy]\nmeasurements = "results"\n[link]\nseal = "none"\n')
    assert load(file).proxy.measurements == str(tmp_path / "results")
