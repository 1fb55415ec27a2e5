"""Energy counters from recorded powercap trees, and of a stand-in for NVML: no machine of ours has either."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.transfer.powercap import unpack
from transfer import energy


class Clock:
    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns


def add_uj(zone: Path, microjoules: int) -> None:
    """As the hardware does: at the end of its range the counter begins again."""
    range_uj = int((zone / "max_energy_range_uj").read_text())
    counted = int((zone / "energy_uj").read_text()) + microjoules
    (zone / "energy_uj").write_text(f"{counted % range_uj}\n")


@pytest.fixture
def server(tmp_path: Path) -> Path:
    return unpack("two_sockets_with_dram", tmp_path / "powercap")


def test_both_sockets_with_their_dram(server: Path) -> None:
    found = energy.rapl(server)
    assert [counter.name for counter in found.counters] == ["package-0", "dram-0", "package-1", "dram-1"]
    assert [counter.package for counter in found.counters] == [0, 0, 1, 1]
    assert found.counters[1].joules() == pytest.approx(55102.345678)
    assert found.counters[1].wraps_at_j == pytest.approx(65712.999613)
    assert found.why_none is None


def test_one_socket_of_two(server: Path) -> None:
    assert [counter.name for counter in energy.rapl(server, {1}).counters] == ["package-1", "dram-1"]
    assert energy.rapl(server, {7}).counters == ()


def test_parts_and_the_whole_board_are_not_counted_twice(tmp_path: Path) -> None:
    found = energy.rapl(unpack("desktop_with_psys", tmp_path))
    assert [counter.name for counter in found.counters] == ["package-0"]


def test_power_across_the_end_of_a_counter(server: Path) -> None:
    clock = Clock()
    meter = energy.PowerMeter(energy.rapl(server, {0}).counters, clock)
    assert meter.watts() == {}
    clock.ns += 2_000_000_000
    add_uj(server / "intel-rapl:0", 400_000_000)  # 147 J past its end
    add_uj(server / "intel-rapl:0/intel-rapl:0:0", 30_000_000)
    assert int((server / "intel-rapl:0/energy_uj").read_text()) < 200_000_000
    assert meter.watts() == {"package-0": pytest.approx(200), "dram-0": pytest.approx(15)}
    assert meter.power() == energy.Power(215.0, "package-0, dram-0")


def test_power_is_a_mean_over_a_second_or_more_and_of_no_old_reading(server: Path) -> None:
    clock = Clock()
    meter = energy.PowerMeter(energy.rapl(server, {1}).counters, clock)
    clock.ns += energy.SHORTEST_NS - 1
    assert meter.watts() == {}
    clock.ns += 1
    add_uj(server / "intel-rapl:1", 50_000_000)
    assert meter.watts()["package-1"] == pytest.approx(50)
    clock.ns += 1
    assert meter.watts()["package-1"] == pytest.approx(50)
    clock.ns += energy.LONGEST_NS + 1
    assert meter.watts() == {}
    clock.ns += energy.SHORTEST_NS
    assert meter.watts()["package-1"] == 0


def test_a_counter_that_cannot_be_read_any_more_makes_power_unknown(server: Path) -> None:
    clock = Clock()
    meter = energy.PowerMeter(energy.rapl(server).counters, clock)
    (server / "intel-rapl:1/energy_uj").unlink()
    for _ in range(3):
        clock.ns += energy.SHORTEST_NS
        assert meter.power() is None


def test_files_of_root_alone(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_zone: Path) -> float:
        raise PermissionError(13, "Permission denied")

    # The tests may run as root, whom no mode keeps out.
    monkeypatch.setattr(energy, "_joules", refused)
    found = energy.rapl(server)
    assert found.counters == ()
    assert "energy_uj cannot be read (Permission denied); it is root's alone" in (found.why_none or "")
    assert energy.PowerMeter(found.counters).power() is None


@pytest.mark.parametrize("content", ["", "many\n"])
def test_a_counter_that_is_no_number(server: Path, content: str) -> None:
    for zone in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0/intel-rapl:0:0", "intel-rapl:1/intel-rapl:1:0"):
        (server / zone / "energy_uj").write_text(content)
    assert energy.rapl(server).counters == ()


def test_a_host_without_rapl(tmp_path: Path) -> None:
    found = energy.rapl(tmp_path / "absent")
    assert found == energy.Found((), f"{tmp_path}/absent has no RAPL package")


def test_packages_of_the_processors_that_this_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, package in ((0, 0), (1, 0), (2, 1)):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{package}\n")
    for mine, packages in (({0, 1}, {0}), ({2}, {1}), ({1, 2}, {0, 1}), ({0, 3}, None)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, mine=mine: mine)
        assert energy.own_packages(tmp_path) == packages


class NVMLError(Exception):
    pass


def fake_nvml(monkeypatch: pytest.MonkeyPatch, millijoules: dict[Any, int], missing: bool = False) -> None:
    def begin() -> None:
        if missing:
            raise NVMLError("NVML Shared Library Not Found")

    def handle(name: Any) -> Any:
        if name not in millijoules:
            raise NVMLError("Invalid Argument")
        return name

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=begin,
        nvmlDeviceGetCount=lambda: len(millijoules),
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=lambda name: millijoules[name],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


def test_gpus_that_count_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    millijoules: dict[Any, int] = {0: 1_000, 1: 5_000}
    fake_nvml(monkeypatch, millijoules)
    assert [counter.name for counter in energy.gpus().counters] == ["gpu 0", "gpu 1"]
    clock = Clock()
    meter = energy.PowerMeter(energy.gpus("1").counters, clock)
    clock.ns += 2_000_000_000
    millijoules[1] += 500_000
    assert meter.power() == energy.Power(250.0, "gpu 1")
    clock.ns += 2_000_000_000
    millijoules[1] = 0  # the driver was loaded again
    assert meter.power() is None


def test_gpus_by_uuid_and_ones_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, {"GPU-8f6a": 1})
    assert [counter.name for counter in energy.gpus("GPU-8f6a").counters] == ["gpu GPU-8f6a"]
    assert energy.gpus("3") == energy.Found((), "NVML: Invalid Argument")
    assert energy.gpus("") == energy.Found((), "NVML shows no GPU")


def test_no_driver_and_no_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, {}, missing=True)
    assert energy.gpus() == energy.Found((), "NVML: NVML Shared Library Not Found")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.gpus() == energy.Found((), "nvidia-ml-py is not installed")
