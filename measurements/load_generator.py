"""``vllm bench serve`` in a process of its own: what a run is told, and what it found, checked before it counts.

Ours is only the way to it: prompts, requests, clocks and percentiles of a run are vLLM's.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from isthmus.children import die_with_parent
from measurements import load_process
from transfer.errors import ConfigError, EngineError

START_S = 240.0
_TAIL_CHARS = 600
_LARGEST_BYTES = 256 << 20


class Target(NamedTuple):
    """Whom to ask: the proxy's address, the model's name there, and a folder with its tokenizer."""

    url: str
    model: str
    tokenizer: str


class Ask(NamedTuple):
    """One run: ``requests`` prompts of random tokens, ``concurrency`` of them open at a time.

    The first ``shared_tokens`` of every prompt are the same. ``seed`` makes the tokens; ``headers`` go with every one.
    """

    requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    shared_tokens: int = 0
    seed: int = 0
    headers: tuple[str, ...] = ()


class Request(NamedTuple):
    """One request as the generator saw it: seconds, tokens; ``itl_s`` are the gaps between pieces of text."""

    began_s: float
    ttft_s: float
    e2e_s: float
    itl_s: list[float]
    prompt_tokens: int
    output_tokens: int

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.e2e_s - self.ttft_s) / max(self.output_tokens - 1, 1)


class Generator:
    """``with Generator(log) as generator``: runs one after another. A process that died is started again."""

    def __init__(self, log: Path, python: str = sys.executable) -> None:
        if python == sys.executable and importlib.util.find_spec("vllm") is None:
            raise ConfigError("the load generator is `vllm bench serve`, and vLLM is not installed here")
        self._log = log
        self._python = python
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, target: Target, ask: Ask, saved: Path, deadline_s: float) -> list[Request]:
        """Run ``ask`` against ``target``, leave the generator's own file at ``saved`` and return its requests.

        Raises :class:`EngineError` if the generator dies, refuses, takes longer than ``deadline_s``, or its file does
        not hold every request whole.
        """
        saved.unlink(missing_ok=True)
        process = self._started()
        assert process.stdin is not None  # noqa: S101 - a pipe
        try:
            process.stdin.write(json.dumps(arguments(target, ask, saved)).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            raise EngineError(f"the load generator died: {self._tail()}") from None
        answer = self._answer(process, deadline_s)
        if answer.get("error"):
            raise EngineError(f"the load generator failed: {answer['error'][:_TAIL_CHARS]}")
        return read(saved, ask)

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - ours
                [self._python, "-P", load_process.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "NO_PROXY": "*"},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self._answer(self._process, START_S)
        return self._process

    def _answer(self, process: subprocess.Popen[bytes], deadline_s: float) -> dict[str, Any]:
        assert process.stdout is not None  # noqa: S101 - a pipe
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(deadline_s):
                self.stop()
                raise EngineError(f"the load generator was not done after {deadline_s:.0f} s")
        line = process.stdout.readline()
        if not line:
            self.stop()
            raise EngineError(f"the load generator died: {self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _tail(self) -> str:
        try:
            return self._log.read_text(errors="replace")[-_TAIL_CHARS:].strip()
        except OSError:
            return "it left no log"


def arguments(target: Target, ask: Ask, saved: Path) -> list[str]:
    """The command line of ``vllm bench serve`` for ``ask``."""
    own_tokens = ask.prompt_tokens - ask.shared_tokens
    given = {
        "--backend": "openai",
        "--base-url": target.url,
        "--endpoint": "/v1/completions",
        "--model": target.model,
        "--served-model-name": target.model,
        "--tokenizer": target.tokenizer,
        "--dataset-name": "random",
        "--random-prefix-len": ask.shared_tokens,
        "--random-input-len": own_tokens,
        "--random-output-len": ask.output_tokens,
        "--random-range-ratio": 0,
        "--num-prompts": ask.requests,
        "--max-concurrency": ask.concurrency,
        "--seed": ask.seed,
        "--temperature": 0,
        # Its test request would fill caches with the first prompt.
        "--ready-check-timeout-sec": 0,
        "--result-dir": saved.parent,
        "--result-filename": saved.name,
    }
    flags = ["--save-result", "--save-detailed", "--disable-tqdm", "--ignore-eos"]
    headers = ["--header", *ask.headers] if ask.headers else []
    return [str(each) for pair in given.items() for each in pair] + flags + headers


def read(saved: Path, ask: Ask) -> list[Request]:
    """The requests in a file of ``vllm bench serve --save-detailed``.

    Raises :class:`EngineError` naming what is wrong: a file that is none, requests that failed or ended early, times
    that are no numbers.
    """
    try:
        if saved.stat().st_size > _LARGEST_BYTES:
            raise EngineError(f"{saved} is over {_LARGEST_BYTES >> 20} MiB")
        found = json.loads(saved.read_text())
        columns = [found[name] for name in ("start_times", "ttfts", "latencies", "itls", "input_lens", "output_lens")]
        errors = [error for error in found["errors"] if error]
        rows = list(zip(*columns, strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{saved} is no result of vllm bench serve: {type(error).__name__} {error}") from None
    if errors:
        raise EngineError(f"{len(errors)} of {len(rows)} requests failed: {_last_line(errors[0])}")
    if len(rows) != ask.requests:
        raise EngineError(f"the generator reports {len(rows)} requests, not {ask.requests}")
    return list(_requests(rows, ask))


def _requests(rows: Sequence[tuple[Any, ...]], ask: Ask) -> Iterator[Request]:
    for number, (began_s, ttft_s, e2e_s, itl_s, prompt_tokens, output_tokens) in enumerate(rows):
        times = [began_s, ttft_s, e2e_s, *itl_s]
        if not all(isinstance(each, int | float) and math.isfinite(each) and each >= 0 for each in times):
            raise EngineError(f"request {number} has times that are no numbers")
        if not 0 < ttft_s <= e2e_s:
            raise EngineError(f"request {number} took {e2e_s:.3f} s and its first token {ttft_s:.3f} s")
        if output_tokens != ask.output_tokens:
            raise EngineError(f"request {number} ended after {output_tokens} of {ask.output_tokens} tokens")
        yield Request(began_s, ttft_s, e2e_s, list(itl_s), prompt_tokens, output_tokens)


def _last_line(text: str) -> str:
    lines = [line for line in str(text).splitlines() if line.strip()]
    return (lines[-1] if lines else "no reason given")[:_TAIL_CHARS]
