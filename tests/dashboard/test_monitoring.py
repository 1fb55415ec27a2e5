"""Alerts and Grafana's dashboard name metrics that exist, and say what they should when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from proxy import metrics
from tests.proxy.conftest import Stack, wait_until
from tests.proxy.fake_worker import FakeWorker
from transfer.messages import Status, TierStatus

FILES = Path(__file__).parents[2] / "ansible" / "roles" / "monitoring" / "files"
PARTS = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt install prometheus")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((FILES / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return list(json.loads((FILES / "dashboard.json").read_text())["panels"])


def expressions() -> list[str]:
    return [rule["expr"] for rule in rules()] + [target["expr"] for panel in panels() for target in panel["targets"]]


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False, timeout=60)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_every_metric_that_is_named_exists(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = FakeWorker._status

    def with_tiers(worker: FakeWorker) -> Status:
        tier = TierStatus(name="disk", used_bytes=1, capacity_bytes=2, blocks=3, evicted={"corrupt": 4})
        return msgspec.structs.replace(plain(worker), tiers=(tier,), package_watts=80.0, dram_watts=9.0)

    monkeypatch.setattr(FakeWorker, "_status", with_tiers)
    wait_until(lambda: (status := stack.gateway.workers.any_status) and status.tiers)
    told = stack.http.get("/metrics").text
    exist = {
        name + part
        for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", told, re.MULTILINE)
        for part in PARTS.get(kind, ("",))
    }
    named = {name for each in expressions() for name in re.findall(r"isthmus_\w+", each)}
    assert len(named) > 25
    assert named - exist == set()
    assert re.search(r'isthmus_worker_tier_evicted\{reason="corrupt",tier="disk",worker=".+"\} 4.0', told)


def test_bounds_of_predictions_that_are_asked_for_exist() -> None:
    asked = {float(bound) for each in expressions() for bound in re.findall(r'le="([^"]+)"', each)}
    assert asked
    assert asked <= set(metrics._ERROR_BUCKETS)


def test_panels_lie_beside_each_other() -> None:
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in panels()]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in panels()}) == len(places)


@needs_promtool
def test_promtool_takes_the_alerts_and_what_the_dashboard_asks(tmp_path: Path) -> None:
    assert promtool("check", "rules", str(FILES / "alerts.yml")) == ""
    asked = [
        {"record": f"asked:{number}", "expr": each.replace("$__range", "1h")}
        for number, each in enumerate(expressions())
    ]
    as_rules = tmp_path / "asked.yml"
    as_rules.write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": asked}]}))
    assert promtool("check", "rules", str(as_rules)) == ""


@needs_promtool
def test_alerts_come_when_they_should() -> None:
    assert promtool("test", "rules", str(Path(__file__).parent / "alerts_in_time.yml")) == ""


def test_every_alert_is_tried_in_time() -> None:
    tried = yaml.safe_load((Path(__file__).parent / "alerts_in_time.yml").read_text())["tests"]
    names = {each["alertname"] for test in tried for each in test["alert_rule_test"]}
    assert names == {rule["alert"] for rule in rules()}
