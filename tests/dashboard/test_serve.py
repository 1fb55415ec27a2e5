from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

from proxy.api_keys import make
from proxy.dashboard import serve
from proxy.dashboard.serve import STATIC
from tests.proxy.conftest import Stack, make_cluster, running

MOST_BYTES = 300_000


def linked(text: str) -> set[str]:
    return set(re.findall(r'(?:src|href)="(/static/[^"]+)"', text))


def test_the_page_and_its_files_come_with_a_strict_policy(stack: Stack) -> None:
    page = stack.http.get("/")
    assert page.status_code == 200
    answers = [page, *(stack.http.get(path) for path in linked(page.text))]
    assert len(answers) > 4
    for answer in answers:
        assert answer.status_code == 200
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


def test_no_script_or_style_stands_in_the_page() -> None:
    text = (STATIC / "index.html").read_text()
    assert not re.search(r"<script[^>]*>[^<]|<style|\sstyle=|\son[a-z]+=", text)


def test_nothing_names_another_host() -> None:
    ours = [path for path in STATIC.iterdir() if path.is_file()]
    assert len(ours) > 10
    for path in ours:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.", text), path.name


def test_nothing_of_ours_sets_html() -> None:
    for path in STATIC.glob("*.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", path.read_text()), path


def test_all_files_together_are_small() -> None:
    assert sum(path.stat().st_size for path in STATIC.rglob("*") if path.is_file()) < MOST_BYTES


def test_a_file_outside_is_not_served(stack: Stack) -> None:
    for path in ("/static/../serve.py", "/static/%2e%2e/serve.py", "/static/vendor/../../serve.py", "/static/"):
        assert stack.http.get(path).status_code in (404, 405)


def test_only_the_empty_page_is_there_without_a_key(hf_dir: Path, tmp_path: Path) -> None:
    key = make(tmp_path / "keys", "me")
    with running(make_cluster(hf_dir, api_keys_file=str(tmp_path / "keys"))) as stack:  # type: ignore[arg-type]
        for path in ("/", "/static/app.js", "/static/vendor/uPlot.iife.min.js"):
            assert stack.http.get(path).status_code == 200
        for path in ("/ledger", "/nodes", "/events", "/metrics", "/dashboard/measured", "/v1/models", "/static"):
            assert stack.http.get(path).status_code == 401, path
        known = httpx.get(f"{stack.url}/ledger", headers={"Authorization": f"Bearer {key}"}, trust_env=False)
        assert known.status_code == 200


@pytest.mark.parametrize("folder", serve.FOLDERS, ids=str)
def test_results_that_were_measured_are_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert serve.result("crossover") is None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "crossover.json"
    path.write_text(json.dumps({"measure": "crossover", "command": ["isthmus"], "summary": {"a": 1}, "samples": [1]}))
    assert serve.result("crossover") == {"command": ["isthmus"], "summary": {"a": 1}}
    for wrong in ("", "[]", "{}", '{"measure": "codec", "command": [], "summary": {}}', '{"measure": "crossover"}'):
        path.write_text(wrong)
        assert serve.result("crossover") is None
