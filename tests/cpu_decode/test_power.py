"""A real worker says the power of the packages that it was given counters of, and nothing without them."""

from __future__ import annotations

from pathlib import Path

from tests.cpu_decode.serving import Running
from tests.transfer.powercap import unpack
from transfer import energy


def test_a_worker_says_its_power_where_it_is_known(running: Running, tmp_path: Path) -> None:
    unknown = running.client.status()
    assert (unknown.package_watts, unknown.dram_watts, unknown.power_of) == (None, None, "")
    server = unpack("two_sockets_with_dram", tmp_path)
    times_ns = iter(range(0, 10**12, 2 * 10**9))
    running.worker.power = energy.PowerMeter(energy.rapl(server, {1}).counters, lambda: next(times_ns))
    for zone, microjoules in (("intel-rapl:1", 81_414_567_890), ("intel-rapl:1/intel-rapl:1:0", 43_240_987_654)):
        (server / zone / "energy_uj").write_text(f"{microjoules}\n")
    status = running.client.status()
    running.worker.power = energy.PowerMeter(())
    assert (status.package_watts, status.dram_watts, status.power_of) == (90.0, 15.0, "package-1, dram-1")


def test_packages_without_dram_say_nothing_of_it(running: Running, tmp_path: Path) -> None:
    desktop = unpack("desktop_with_psys", tmp_path)
    times_ns = iter(range(0, 10**12, 10**9))
    running.worker.power = energy.PowerMeter(energy.rapl(desktop).counters, lambda: next(times_ns))
    (desktop / "intel-rapl:0/energy_uj").write_text("41004000\n")
    status = running.client.status()
    running.worker.power = energy.PowerMeter(())
    assert (status.package_watts, status.dram_watts, status.power_of) == (40.0, None, "package-0")
