"""What several rooms' tests need."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import thread as pool_threads
from dataclasses import dataclass
from pathlib import Path

import pytest

# As the decode service does: engines in one test process share the cores, idle ones must not spin for long.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# A shell has what it starts in the background ignore Ctrl-C; what the tests start there must hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)

THREADS_END_S = 5.0


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


@pytest.fixture(scope="session", autouse=True)
def no_thread_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A thread that outlives the last fixture is a leak; Python would wait for it at the end, perhaps forever."""
    yield
    deadline_s = time.monotonic() + THREADS_END_S
    while (left := leaked_threads()) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    if left:
        if not hasattr(request.config, "workerinput"):
            # Where xdist has started this process it ends it, too.
            request.config.add_cleanup(lambda: os._exit(pytest.ExitCode.TESTS_FAILED))
        frames = sys._current_frames()
        pytest.fail(
            "".join(f"{thread}:\n{''.join(traceback.format_stack(frames[thread.ident or 0]))}" for thread in left)
        )


def leaked_threads() -> list[threading.Thread]:
    """Those that Python waits for when it ends, but for pools, which end with it."""
    return [
        thread
        for thread in threading.enumerate()
        if thread is not threading.main_thread() and not thread.daemon and thread not in pool_threads._threads_queues
    ]
