"""llama.cpp's own ``llama-batched-bench`` and ``llama-server``, from the source that llama-cpp-python was built from.

They are built once a version, in some minutes, into the user's cache, with the flags of ``requirements/install.sh``,
and run on the installed libraries: what is compared computes with the same bytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from transfer.errors import ConfigError

DISTRIBUTION = "llama-cpp-python"
TARGETS = ("llama-batched-bench", "llama-server")
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_COMMON=ON",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
BUILD_S = 3600.0


class Tools(NamedTuple):
    """Programs, and the environment to start them in."""

    batched_bench: Path
    server: Path
    environment: dict[str, str]


def tools(console: Console) -> Tools:
    """The programs, built first if this version's are not there yet.

    Raises :class:`ConfigError` if there is no compiler, no source or no way to build it.
    """
    import llama_cpp

    version = metadata.version(DISTRIBUTION)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "isthmus" / f"llama-tools-{version}"
    binaries = folder / "bin"
    if not all((binaries / target).is_file() for target in TARGETS):
        _build(version, folder, console)
    installed = Path(llama_cpp.__file__).parent / "lib"
    environment = os.environ | {"LD_LIBRARY_PATH": f"{installed}:{binaries}"}
    return Tools(binaries / TARGETS[0], binaries / TARGETS[1], environment)


def _build(version: str, folder: Path, console: Console) -> None:
    for tool in ("gcc", "g++", "cmake", "make"):
        if shutil.which(tool) is None:
            raise ConfigError(f"{tool} is missing: llama.cpp's own programs, to compare with, are built from source")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="isthmus-llama-") as temporary:
        work = Path(temporary)
        console.print(f"building {' and '.join(TARGETS)} of {DISTRIBUTION} {version} (some minutes, once)")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", DISTRIBUTION]
        _run([*pip, f"{DISTRIBUTION}=={version}", "--dest", temporary], "get the source")
        source = _unpack(next(work.glob("*.tar.gz")), work)
        _run(["cmake", "-S", str(source), "-B", str(work / "build"), *FLAGS], "configure")
        jobs = str(len(os.sched_getaffinity(0)))
        _run(["cmake", "--build", str(work / "build"), "--parallel", jobs, "--target", *TARGETS], "compile")
        # Moved into place whole: a build that was cut off must not look like a finished one.
        partial = folder.with_name(folder.name + ".part")
        for old in (folder, partial):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(work / "build" / "bin", partial / "bin", symlinks=True)
        partial.rename(folder)


def _unpack(archive: Path, folder: Path) -> Path:
    """Unpack the vendored llama.cpp; returns its folder."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_S)  # noqa: S603 ours
    if done.returncode:
        raise ConfigError(f"cannot {what} for llama.cpp's own programs:\n{(done.stdout + done.stderr)[-2000:]}")
