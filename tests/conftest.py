"""What several rooms' tests need."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

# As the decode service does: engines in one test process share the cores, idle ones must not spin for long.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# A shell has what it starts in the background ignore Ctrl-C; what the tests start there must hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class ModelPair:
    """One set of weights for both engines."""

    name: str
    hf_dir: Path
    gguf: Path


@pytest.fixture(scope="session")
def default_pair() -> ModelPair:
    """SmolLM2-135M-Instruct; made once a machine, in about half a minute."""
    from isthmus import pair

    made = pair.default_pair()
    return ModelPair(name=made.name, hf_dir=Path(made.hf_dir), gguf=Path(made.gguf))
