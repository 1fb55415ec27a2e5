"""A real decode worker that is killed while somebody looks at the page."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.up import with_keys
from proxy.app import create_app
from tests.conftest import ModelPair
from tests.dashboard.browser import Open, needs_chromium
from tests.proxy.conftest import free_port, serving
from transfer.config import Cluster, Decode, Pair, Prefill, Proxy, dump

pytestmark = [pytest.mark.engines, needs_chromium]

START_S = 120.0


def test_it_turns_red_and_comes_back(default_pair: ModelPair, tmp_path: Path, open_page: Open) -> None:
    control, kv, kv_control, port = (free_port() for _ in range(4))
    decode = Decode(
        control_port=control,
        kv_port=kv,
        kv_control_port=kv_control,
        num_cells=512,
        threads=1,
        numa="off",
        speculate="off",
    )
    cluster = with_keys(
        Cluster(
            pair=Pair(name="pair", hf_dir=str(default_pair.hf_dir), gguf=str(default_pair.gguf)),
            prefill=Prefill(port=free_port()),
            decode=decode,
            proxy=Proxy(port=port, registry_port=free_port()),
        ),
        tmp_path / "keys",
    )
    config = tmp_path / "isthmus.toml"
    config.write_bytes(dump(cluster))
    command = [sys.executable, "-P", "-m", "isthmus", "decode", "--config", str(config)]
    card = f"document.querySelector(\"[data-worker='127.0.0.1:{control}']\")"
    with serving(create_app(cluster), port):
        worker = subprocess.Popen(command)
        try:
            seen = open_page(f"http://127.0.0.1:{port}/#nodes")
            seen.until(f"{card}?.dataset.state === 'up'", seconds=START_S)
            assert "0 of 512" in seen.page.inner_text("#workers")
            healthy = seen.page.evaluate(f"getComputedStyle({card}).backgroundColor")
            worker.kill()
            assert worker.wait(10) == -signal.SIGKILL
            seen.until(f"{card}.dataset.state === 'down'")
            assert seen.page.evaluate(f"getComputedStyle({card}).backgroundColor") != healthy
            assert "down" in seen.page.inner_text("#workers .state")
            worker = subprocess.Popen(command)
            seen.until(f"{card}.dataset.state === 'up'", seconds=START_S)
            assert seen.page.evaluate(f"getComputedStyle({card}).backgroundColor") == healthy
            assert seen.errors == []
        finally:
            worker.kill()
            worker.wait()
