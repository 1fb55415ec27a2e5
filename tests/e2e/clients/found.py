"""Clients that live in environments of their own, because their requirements clash with ours or are large.

Each is looked for in a folder of its name under ``ISTHMUS_CLIENTS``, made with
``python -m venv FOLDER/NAME && FOLDER/NAME/bin/pip install ...``. Unless that is set their tests are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("ISTHMUS_CLIENTS") or Path.home() / ".cache" / "isthmus" / "clients")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "*"}


def program(name: str, command: str, requirement: str) -> Path:
    """``command`` of the environment called ``name``; the test is skipped where there is none, or none is wanted."""
    found = FOLDER / name / "bin" / command
    if "ISTHMUS_CLIENTS" not in os.environ or not found.exists():
        pytest.skip(f"set ISTHMUS_CLIENTS to a folder with an environment {name!r}: pip install {requirement}")
    return found


def environment(home: Path) -> dict[str, str]:
    """Variables for a client that must download nothing and keeps its files in ``home``."""
    return {**os.environ, **OFFLINE, "HF_HOME": str(home), "XDG_CACHE_HOME": str(home)}
