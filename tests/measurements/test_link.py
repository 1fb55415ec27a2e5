"""The whole command, on a few tokens; what it says of speed is not looked at."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.progress import Progress

from isthmus.cli import cli
from measurements import link, link_inject, link_namespaces
from measurements.link_sender import Peer
from measurements.link_summary import CHECKED, IPERF3, MEMCPY, ZMQ, ZMQ_COPIED, ZMQ_KEPT, summarize
from tests.measurements.link_agent import serving
from transfer.config import Link
from transfer.errors import ConfigError, EngineError

BARE = {ZMQ, ZMQ_COPIED}
PATH_WAYS = {*BARE, "raw", "q8", "raw integrity", "raw aes-gcm"}
SHORT = Link(chunk_tokens=16)


def shaped_links_are_missing() -> str:
    """Why this host has none; empty if it has."""
    try:
        with link_namespaces.shaped_link():
            return ""
    except (ConfigError, EngineError) as error:
        return str(error)


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True, timeout=20).stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith("isthmus-")}


def test_every_way_is_measured_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # More than one chunk, so that credits are needed, and a last one that is not full.
    monkeypatch.setattr(link, "Link", lambda: SHORT)
    measure = link_inject.measure
    monkeypatch.setattr(link_inject, "measure", lambda rounds: measure(rounds, num_cells=128, chunk_tokens=64))
    link.run(tmp_path / "link.json", tmp_path / "link.png", 1, 40, shaped=False)
    written = json.loads((tmp_path / "link.json").read_text())
    loopback = [sample["way"] for sample in written["samples"] if sample["part"] == "loopback"]
    assert sorted(loopback) == sorted(
        {MEMCPY, CHECKED, ZMQ, ZMQ_COPIED, ZMQ_KEPT, *link.CODECS, "raw integrity", "raw aes-gcm"}
    )
    assert {s["way"] for s in written["samples"] if s["part"] == "inject"} == {"inject", MEMCPY, "stall"}
    assert written["measure"] == "link"
    assert written["summary"] == summarize(written["samples"], "shaped_10g")
    assert {"loopback_raw_gb_per_s", "loopback_raw_vs_zmq", "loopback_raw_vs_zmq_bound", "inject_vs_memcpy"} <= set(
        written["summary"]
    )
    assert (tmp_path / "link.png").stat().st_size > 1000


def test_a_path_between_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "Link", lambda: SHORT)
    with serving(tmp_path) as (_, endpoint):
        peer = Peer(endpoint)
        try:
            samples = list(link.over_path(Progress(disable=True), peer, 1, 40))
            peer.leave()
        finally:
            peer.close()
    ways = {s["way"] for s in samples if s["part"] == "path"}
    assert ways == PATH_WAYS | ({IPERF3} if shutil.which("iperf3") else set())
    assert {s["way"] for s in samples if s["part"] == "exposed"} == {
        "raw",
        "q8",
        "raw aes-gcm",
        "raw late",
        "q8 late",
        "raw serial",
    }
    assert {"path_q8_vs_raw", "exposed_raw_fraction", "exposed_q8_frames", "peak_landing_bytes"} <= set(
        summarize(samples, "path")
    )


@pytest.mark.skipif(bool(why := shaped_links_are_missing()), reason=f"no shaped link here: {why}")
def test_a_shaped_link_is_measured_and_removed() -> None:
    before = namespaces()
    samples = list(link.over_shaped_link(1, 32))
    assert {s["way"] for s in samples if s["part"] == "path"} == {*PATH_WAYS, IPERF3}
    assert "shaped_10g_raw_vs_iperf3" in summarize(samples, "shaped_10g")
    assert namespaces() <= before


@pytest.mark.skipif(bool(why), reason=f"no shaped link here: {why}")
def test_a_shaped_link_has_the_shape_and_goes_away_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), link_namespaces.shaped_link() as ends:
        for name in (ends.sending, ends.receiving):
            shown = subprocess.run(["tc", "-n", name, "qdisc"], capture_output=True, text=True, check=True, timeout=20)
            assert "tbf" in shown.stdout
            assert "rate 10Gbit" in shown.stdout
        ping = link_namespaces.inside(ends.sending, "ping", "-M", "do", "-s", "8900", "-c", "1", ends.receiving_host)
        if shutil.which("ping"):
            assert subprocess.run(ping, capture_output=True, check=False, timeout=20).returncode == 0
        raise ZeroDivisionError
    assert not {ends.sending, ends.receiving} & namespaces()


@pytest.mark.skipif(bool(why), reason=f"no shaped link here: {why}")
def test_sigterm_removes_the_namespaces_too() -> None:
    program = """
import os, signal
from measurements.link_namespaces import shaped_link
with shaped_link() as ends:
    print(ends.sending, ends.receiving, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 143
    assert len(ended.stdout.split()) == 2
    assert not set(ended.stdout.split()) & namespaces()


def test_what_a_shaped_link_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda program: None if program == "iperf3" else program)
    with pytest.raises(ConfigError, match="needs iperf3: install the package iperf3"):
        link.run(None, None, 1, 40, shaped=True)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="needs root"):
        link.run(None, None, 1, 40, shaped=True)


@pytest.mark.parametrize(
    "endpoint", ["", "localhost:7311", "tcp://host", "tcp://host:99999", "udp://h:1", "tcp://h:1/x"]
)
def test_an_endpoint_must_be_one(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="--peer"):
        link.parse_endpoint(endpoint, "--peer")


def test_a_good_endpoint_is_taken_apart() -> None:
    assert link.parse_endpoint("tcp://192.168.1.7:7311", "--serve") == ("192.168.1.7", 7311)


@pytest.mark.parametrize(
    "options", [["--shaped", "--peer", "tcp://h:1"], ["--serve", "tcp://h:1", "--peer", "tcp://h:1"]]
)
def test_different_runs_do_not_mix(options: list[str]) -> None:
    with pytest.raises(ConfigError, match="different runs"):
        cli.main(["measure", "link", *options], standalone_mode=False)
