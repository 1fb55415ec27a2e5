from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"isthmus", "transfer", "gpu_prefill", "cpu_decode", "proxy", "measurements"}


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("isthmus-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_has_our_packages_and_nothing_else(wheel_files: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_files}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    assert not [name for name in wheel_files if "test" in name or "__pycache__" in name]


def test_the_wheel_has_every_module_and_the_prompt(wheel_files: list[str]) -> None:
    sources = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert sources <= set(wheel_files)
    assert "isthmus/prompts/first_light.txt" in wheel_files


def test_no_other_distribution_owns_our_names() -> None:
    owners = packages_distributions()
    assert {name: owners[name] for name in PACKAGES & owners.keys() if set(owners[name]) != {"isthmus"}} == {}
