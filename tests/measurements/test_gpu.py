"""The GPU's checks, run on a CPU: what they find equal is equal, and what is wrong they find."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import structlog.testing
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from gpu_prefill.schedule import ExportSchedule  # noqa: E402
from isthmus.ask import Answer  # noqa: E402
from measurements.gpu import churn, gather, served  # noqa: E402
from measurements.gpu.__main__ import main  # noqa: E402
from transfer.config import Cluster, Pair  # noqa: E402

REQUESTS = 25


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Many small operations: threads that wait for each other would take several times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def planes(shape: gather.Shape, tokens: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    size = tokens * shape.heads * shape.dim
    return [rng.integers(0, 1 << 16, size, dtype=np.uint16) for _ in range(4)]


def test_gathering_is_plain_indexing() -> None:
    shape = gather.Shape(2, 16, 8, 16)
    samples = list(gather.check_real("cpu", planes(shape, 70), shape))
    assert [sample["layout"] for sample in samples] == ["NHD", "HND"]
    summary = gather.summarize(samples)
    assert summary["comparisons"] == 48
    assert summary["wrong_elements"] == 0


@pytest.mark.parametrize("broken", ["gather", "gather_into"])
def test_what_is_wrong_is_counted(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    right = getattr(gather, broken)

    def wrong(*arguments: Any) -> Any:
        found = right(*arguments)
        if found is None:
            arguments[0].view(torch.int16).bitwise_xor_(1)
            return None
        return found ^ 1

    monkeypatch.setattr(gather, broken, wrong)
    shape = gather.Shape(2, 16, 8, 16)
    assert gather.summarize(list(gather.check_real("cpu", planes(shape, 32), shape)))["wrong_elements"] > 1000


def test_speed_says_what_a_copy_of_the_same_bytes_takes() -> None:
    samples = list(gather.speed("cpu", [16, 32], rounds=2, layers=1))
    assert {sample["payload_bytes"] for sample in samples} == {65536, 131072}
    summary = gather.summarize(samples)
    assert summary["device_copy_share"].keys() == set(gather.DEVICE_CODECS)
    for shares in summary["device_copy_share"].values():
        assert shares.keys() == {"16", "32"}
        assert all(share > 0 for share in shares.values())
    assert summary["pageable_vs_pinned"] == {}


@pytest.fixture(scope="module")
def churned() -> list[dict[str, object]]:
    return churn.run("cpu", REQUESTS)


def test_whatever_is_preempted_no_token_is_wrong(churned: list[dict[str, object]]) -> None:
    assert [sample["wrong_elements"] for sample in churned] == [0] * 4
    assert [sample["unfinished"] for sample in churned] == [0] * 4
    assert [sample["encoded"] for sample in churned if not sample["staged"]] == [0, 0]
    for sample in churned:
        assert sample["encoded"] or not sample["staged"]
        assert sample["preempted"]
        assert sample["deferred"]
        assert sample["steps_without_hooks"]
        assert sample["exported"] == REQUESTS - int(str(sample["aborted"]))


def test_a_block_table_that_a_preemption_left_behind_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    place = ExportSchedule.place

    def place_once(schedule: ExportSchedule, request_id: str, block_ids: list[int]) -> None:
        if not schedule._exports[request_id].block_ids:
            place(schedule, request_id, block_ids)

    monkeypatch.setattr(ExportSchedule, "place", place_once)
    with structlog.testing.capture_logs():  # tracebacks would take longer than all else
        found = churn.run("cpu", REQUESTS)
    assert all(int(sample["wrong_elements"]) + int(sample["unfinished"]) for sample in found)


def test_every_route_is_asked_with_nothing_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    clusters: list[Cluster] = []
    asked: list[str] = []

    class FakeStack:
        proxy_url = "http://proxy"

        def __init__(self, cluster: Cluster, _folder: Path) -> None:
            clusters.append(cluster)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def ask(_url: str, body: dict[str, Any], *, route: str, **_: object) -> Answer:
        asked.append(body["messages"][0]["content"])
        return Answer(text="", completion_tokens=64, ttft_ns=1, total_ns=64, ledger={"route": route})

    monkeypatch.setattr(served, "Stack", FakeStack)
    monkeypatch.setattr(served, "ask", ask)
    samples = list(served.serve(Pair(name="m", hf_dir="hf", gguf="gguf"), "cuda", rounds=2))
    assert [sample["route"] for sample in samples] == ["split", "gpu", "cpu"] * 2
    assert [sample["ledger"]["route"] for sample in samples] == ["split", "gpu", "cpu"] * 2
    assert len(asked) == len(set(asked)) == 9
    (cluster,) = clusters
    assert "--attention-backend=FLASH_ATTN" in cluster.prefill.extra_args
    assert (cluster.prefill.prefix_caching, cluster.decode.pool_mib) == (False, 0)


def test_a_token_that_is_wrong_missing_or_doubled_is_counted() -> None:
    rng = np.random.default_rng(1)
    kv = rng.integers(1, 0x7F80, (churn.LAYERS, 2, 3, churn.HEADS, churn.DIM), dtype=np.uint16)
    request = churn.Request(churn._ticket(1, "raw", interleaved=False), kv)
    whole = [churn.Slab(range(3), 0, kv.reshape(churn.LAYERS, -1), encoded=False)]
    assert churn._wrong(whole, request) == 0
    assert churn._wrong([*whole, *whole], request) == churn.LAYERS * 3
    assert churn._wrong([], request) == churn.LAYERS * 3
    broken = kv.copy()
    broken[0, 0, 0, 0, 0] ^= 1
    assert churn._wrong([whole[0]._replace(elements=broken.reshape(churn.LAYERS, -1))], request) == 1


def test_medians_by_route() -> None:
    samples = [
        {"part": "serve", "route": route, "ttft_ns": ns, "tpot_ns": 1.0, "total_ns": 2 * ns}
        for route, ns in (("split", 1), ("split", 3), ("cpu", 5))
    ]
    assert served.summarize(samples) == {
        "split": {"ttft_ns": 2, "tpot_ns": 1.0, "total_ns": 4},
        "cpu": {"ttft_ns": 5, "tpot_ns": 1.0, "total_ns": 10},
    }


def test_a_result_names_the_device_and_how_to_run_it_again(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--part", "churn", "--requests", "2", "--json", str(out)]
    assert CliRunner().invoke(main, words).exit_code == 0
    written = json.loads(out.read_text())
    assert (written["measure"], written["environment"]["device"]) == ("gpu", "cpu")
    assert written["command"][:3] == ["python", "-m", "measurements.gpu"]
    assert written["summary"]["wrong_elements"] == 0


def test_without_a_gpu_or_a_model_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--json", str(tmp_path / "gpu.json")]
    refused = CliRunner().invoke(main, [*words, "--device", "cpu"])
    assert refused.exit_code == 2
    assert "needs --hf-dir and --gguf" in refused.stderr
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 2
    assert "sees no GPU" in refused.stderr
