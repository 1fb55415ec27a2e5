"""Counters of energy and throttling, from planted trees of sysfs."""

from __future__ import annotations

from pathlib import Path

import pytest

from measurements.host_watch import HostWatch, between


def plant(folder: Path, energy_uj: int, throttled: int = 0) -> HostWatch:
    for zone, name in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0/intel-rapl:0:0", "core"),
        ("intel-rapl:1", "package-1"),
    ):
        package = folder / "powercap" / zone
        package.mkdir(parents=True, exist_ok=True)
        (package / "name").write_text(f"{name}\n")
        (package / "energy_uj").write_text(f"{energy_uj}\n")
        (package / "max_energy_range_uj").write_text("10000000\n")
    counter = folder / "cpu" / "cpu0" / "thermal_throttle"
    counter.mkdir(parents=True, exist_ok=True)
    (counter / "package_throttle_count").write_text(f"{throttled}\n")
    return HostWatch(folder / "powercap", folder / "cpu")


def test_packages_are_counted_and_their_parts_are_not(tmp_path: Path) -> None:
    before = plant(tmp_path, 1_000_000).read()
    after = plant(tmp_path, 3_500_000, throttled=2).read()
    meanwhile = between(before, after)
    assert meanwhile.energy_j == {"package-0": pytest.approx(2.5), "package-1": pytest.approx(2.5)}
    assert meanwhile.throttled == 2
    assert 0 <= meanwhile.steal_share <= 1


def test_a_counter_that_wrapped(tmp_path: Path) -> None:
    before, after = plant(tmp_path, 9_000_000).read(), plant(tmp_path, 500_000).read()
    found = between(before, after).energy_j
    assert found is not None
    assert found["package-0"] == pytest.approx(1.5)


def test_a_host_that_counts_nothing_says_so(tmp_path: Path) -> None:
    watch = HostWatch(tmp_path, tmp_path)
    meanwhile = between(watch.read(), watch.read())
    assert (meanwhile.energy_j, meanwhile.throttled) == (None, None)
    assert watch.why_no_energy is not None
    assert "has no RAPL package" in watch.why_no_energy
