from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from measurements import profiles
from measurements.profiles import HARDWARE, CodecCost, Device, LinkSpeed, ModelShape, Setup, codecs, read
from transfer.errors import ConfigError


@pytest.fixture
def setup() -> Setup:
    return Setup(
        gpu=read("rtx4070s", Device),
        cpu=read("dual-e5-2680v4", Device),
        link=read("10gbe", LinkSpeed),
        model=read("llama-3.1-8b-q4", ModelShape),
        codecs=codecs(["raw", "q8"]),
    )


def test_every_shipped_profile_is_of_one_kind_and_has_sources() -> None:
    for path in HARDWARE.glob("*.toml"):
        if path.stem != "codecs":
            assert [profiles._is(path, kind) for kind in (Device, LinkSpeed, ModelShape)].count(True) == 1, path
        assert path.read_text().startswith("#") or "gbe" in path.stem, f"{path} names no source"


def test_the_worked_example_ships(setup: Setup) -> None:
    assert setup.gpu.memory_gb_per_s == 504
    assert (setup.cpu.nodes, setup.cpu.memory_gb_per_s) == (2, 68)
    assert [read(f"{speed}gbe", LinkSpeed).gbit_per_s for speed in (1, 10, 25)] == [1, 10, 25]


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text('{"name": "mine", "gbit_per_s": 40, "efficiency": 0.9, "handoff_ms": 1}')
    assert read(str(tmp_path / "l.json"), LinkSpeed).gbit_per_s == 40
    (tmp_path / "l.toml").write_text('name = "mine"\ngbit_per_s = 40\nefficiency = 1.5\nhandoff_ms = 1\n')
    with pytest.raises(ConfigError, match=r"l\.toml.*efficiency"):
        read(str(tmp_path / "l.toml"), LinkSpeed)


def test_what_is_not_there_names_what_is() -> None:
    with pytest.raises(ConfigError, match=r"'rtx9999' is neither a file nor a shipped profile; there are .*rtx4070s"):
        read("rtx9999", Device)
    with pytest.raises(ConfigError, match="no costs of codec 'zip' are known; there are raw, q8"):
        codecs(["raw", "zip"])


def test_numbers_are_replaced_by_name(setup: Setup) -> None:
    changed = profiles.changed(setup, ["gpu.memory_gb_per_s=600", "cpu.nodes=1"])
    assert (changed.gpu.memory_gb_per_s, changed.cpu.nodes, changed.link) == (600, 1, setup.link)
    assert profiles.scaled(setup, "link.gbit_per_s", 1.5).link.gbit_per_s == 15


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("tpu.speed=1", "'tpu' is none of gpu, cpu, link, model"),
        ("codecs.name=1", "'codecs' is none of"),
        ("gpu.colour=1", "gpu has no 'colour'; it has name, engine"),
        ("gpu.memory_gb_per_s=fast", "--set gpu.memory_gb_per_s=fast"),
        ("gpu.memory_gb_per_s=-1", "> 0"),
        ("gpu", "gpu has no ''"),
    ],
)
def test_numbers_that_say_nothing(setup: Setup, assignment: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        profiles.changed(setup, [assignment])


def result(folder: Path, measure: str, summary: dict) -> None:
    envelope = {"schema": "isthmus.measure/1", "measure": measure, "summary": summary}
    (folder / f"{measure}.json").write_text(json.dumps(envelope))


def test_results_of_this_machine_replace_shipped_costs(setup: Setup, tmp_path: Path) -> None:
    speed = {"encode_gb_per_s": {"median": 3.0}, "decode_gb_per_s": {"median": 4.0}}
    result(tmp_path, "codec", {"q8": {"bits_per_element": 8.5} | speed})
    result(tmp_path, "link", {"shaped_10g_raw_vs_iperf3": 0.8})
    found = profiles.with_results(setup, tmp_path)
    assert found.codecs == (
        setup.codecs[0],
        CodecCost(name="q8", bits_per_element=8.5, encode_gb_per_s=3.0, decode_gb_per_s=4.0),
    )
    assert found.link.efficiency == 0.8


def test_results_that_are_none(setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither"):
        profiles.with_results(setup, tmp_path)
    result(tmp_path, "codec", {})
    (tmp_path / "codec.json").rename(tmp_path / "link.json")
    with pytest.raises(ConfigError, match="not a result of `isthmus measure link`"):
        profiles.with_results(setup, tmp_path)
    (tmp_path / "link.json").write_text("{")
    with pytest.raises(ConfigError, match=r"link\.json"):
        profiles.with_results(setup, tmp_path)


def test_committed_results_can_be_read(setup: Setup) -> None:
    found = profiles.with_results(setup, HARDWARE.parent / "results")
    assert found.codecs[1].bits_per_element == 8.5
    assert msgspec.structs.replace(found, codecs=setup.codecs, link=setup.link) == setup
