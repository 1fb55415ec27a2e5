"""OpenAI's Node client, from npm, against the real engines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.e2e.clients.found import FOLDER
from tests.e2e.conftest import Running

pytestmark = pytest.mark.engines

VERSION = "7.57.0"
SCRIPT = Path(__file__).parent / "openai_node.mjs"


@pytest.fixture(scope="module")
def installed() -> Path:
    """A folder with the pinned client in it; made once, where npm reaches its registry."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed here")
    folder = FOLDER / f"node-openai-{VERSION}"
    if not (folder / "node_modules" / "openai" / "package.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", f"openai@{VERSION}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            pytest.skip(f"npm cannot install openai@{VERSION}: {done.stderr[-300:]}")
    return folder


def test_the_node_client(installed: Path, stack: Running, http: httpx.Client):
    # Beside node_modules, where node looks for the client.
    script = installed / SCRIPT.name
    script.write_text(SCRIPT.read_text())
    model = stack.cluster.pair.name
    variables = {**os.environ, "BASE_URL": f"{stack.proxy_url}/v1", "MODEL": model}
    done = subprocess.run(
        ["node", str(script)], env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["models"] == [model]
    assert found["streamed"] == found["whole"] != ""
    assert found["usage"]["completion_tokens"] == found["streamed_usage"]["completion_tokens"] == 12
    assert [call["name"] for call in found["calls"]] == ["weather"]
    assert isinstance(json.loads(found["calls"][0]["arguments"])["town"], str)
    assert found["called_reason"] == "tool_calls"
    assert isinstance(found["parsed"]["river"], str)
    assert found["completions"] == [[0, 3], [1, 3]]
    refusal = {"name": "BadRequestError", "status": 400, "param": "temperature", "code": "invalid_request"}
    assert found["refused"] == refusal
    assert found["unknown"] == {"name": "NotFoundError", "status": 404}
    deadline = time.monotonic() + 20
    while http.get("/ledger?last=1").json()["entries"][-1]["status"] != "cancelled":
        assert time.monotonic() < deadline
        time.sleep(0.1)
