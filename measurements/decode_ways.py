"""Decode throughput three ways: our worker, ``llama-batched-bench``, ``llama-server``; same file, threads and flags.

Each way is a context manager that starts its program and gives a function from a number of sequences to tokens/s. Those
numbers must ascend. Between two calls the program does nothing, so that several can be up and compared in turns, and
each is started several times: where its memory comes to lie is worth some percent for as long as a process lives.
"""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import numpy as np

from cpu_decode import numa, profile
from isthmus.children import die_with_parent
from isthmus.ports import free_ports
from measurements.decode_worker import LiveWorker, live_worker
from measurements.llama_tools import Tools
from transfer.config import Decode
from transfer.errors import EngineError

START_S = 300.0
CALIBRATION_TOKENS = 256
RUN_S = 1800.0
STARTS, SEQUENCES_A_START = 3, 4
# llama-server's own word for it.
ANY_SLOT = -1
# Threads at barriers wait the same way in all programs, unless a way is about defaults.
WAIT_POLICY = {"GOMP_SPINCOUNT": "1000"}

Arrivals = list[tuple[int, int]]
# Tokens/s of so many sequences.
Rate = Callable[[int], float]


class _Answer:
    """What ``llama-server`` sent for a prompt, and how many tokens of that it had to compute first."""

    def __init__(self) -> None:
        self.arrivals: Arrivals = []
        self.prompt_tokens = 0


class Setting(NamedTuple):
    """What all ways have in common."""

    gguf: Path
    threads: int
    context_tokens: int
    new_tokens: int
    sequences: tuple[int, ...]
    num_cells: int
    max_sequences: int
    ubatch_tokens: int = 512

    @property
    def decode(self) -> Decode:
        """The same for our worker, on ports that are free now."""
        control, kv, kv_control = free_ports(3)
        return Decode(
            control_port=control,
            kv_port=kv,
            kv_control_port=kv_control,
            num_cells=self.num_cells,
            max_sequences=self.max_sequences,
            threads=self.threads,
            prefill_batch_tokens=self.ubatch_tokens,
            pool_mib=0,
            # What follows synthetic KV goes in circles, and is guessed more easily than any text.
            speculate="off",
        )

    def room_for(self, decode: Decode) -> Decode:
        """``decode`` with enough cells for every sequence, where each has a part of its own."""
        if profile.apply(decode).cell_layout == "unified":
            return decode
        # What a worker times when it starts needs some, too.
        cells = max(self.context_tokens + self.new_tokens, 2 * CALIBRATION_TOKENS)
        return msgspec.structs.replace(decode, num_cells=self.max_sequences * cells)


def turns(sequences: Sequence[int]) -> list[int]:
    """How many sequences each way decodes in every turn once started.

    The fewer, the more turns: they are shorter, and vary more.
    """
    return [count for count in sequences for _ in range(max(1, SEQUENCES_A_START // count))]


def steady_rate(streams: Sequence[Arrivals]) -> float:
    """Tokens/s of all streams while all of them run: from the last one's first arrival to the first one's last.

    A stream is ``(time_ns, tokens)`` of each arrival. Raises :class:`EngineError` if they were never all running.
    """
    began, ended = max(s[0][0] for s in streams), min(s[-1][0] for s in streams)
    if ended <= began:
        raise EngineError("streams did not run at the same time; raise --tokens")
    return sum(n for s in streams for at, n in s if began < at <= ended) * 1e9 / (ended - began)


def whole_rate(asked_ns: int, streams: Sequence[Arrivals]) -> float:
    """Tokens/s of all streams from when they were asked for to the last one's end: they may have waited for others."""
    return sum(n for s in streams for _, n in s) * 1e9 / (max(s[-1][0] for s in streams) - asked_ns)


def ours(worker: LiveWorker, count: int, setting: Setting) -> float:
    """Tokens/s of ``count`` sequences in our worker, over its control socket; their KV is synthetic and lands first."""
    return steady_rate(_ours(worker, count, setting)[1])


def ours_whole(worker: LiveWorker, count: int, setting: Setting) -> float:
    """The same from when they are asked for to the last one's end."""
    return whole_rate(*_ours(worker, count, setting))


def _ours(worker: LiveWorker, count: int, setting: Setting) -> tuple[int, list[Arrivals]]:
    """When they were asked for, their KV being there, and their tokens."""
    streams = []
    for _ in range(count):
        streams.append(worker.reserve(setting.context_tokens, setting.new_tokens, "kv"))
        # Before the next one: there need not be memory for all prompts to gather at once.
        worker.land(streams[-1])
    # Else the first would be done before the last begins.
    worker.await_landing()
    asked_ns = time.monotonic_ns()
    for stream in streams:
        worker.start(stream)
    worker.take_until(streams)
    worker.idle()
    return asked_ns, [list(zip(s.times_ns, s.counts, strict=True)) for s in streams]


@contextmanager
def worker_rate(setting: Setting, decode: Decode, *, whole: bool = False) -> Iterator[Rate]:
    """Of a worker of ours with ``decode``: while all sequences run, or ``whole``, from asking to the end."""
    with warm_worker(setting, decode) as worker:
        yield partial(ours_whole if whole else ours, worker, setting=setting)


@contextmanager
def warm_worker(setting: Setting, decode: Decode) -> Iterator[LiveWorker]:
    """A worker of ours with ``decode`` that has decoded before."""
    with live_worker(setting.gguf, setting.room_for(decode)) as worker:
        ours(worker, 1, setting)
        yield worker


@contextmanager
def bench_rate(setting: Setting, tools: Tools, counts: Sequence[int], more: Sequence[str] = ()) -> Iterator[Rate]:
    """Of ``llama-batched-bench``, as it says it, for one of ``counts`` after the other.

    It goes from one to the next by itself, and its prompts are prefilled, which takes most of its time: it is stopped
    where it has said one rate. Flags in ``more`` take the place of ours.
    """
    command = [
        str(tools.batched_bench),
        *_flags(setting),
        *("-npp", str(setting.context_tokens), "-ntg", str(setting.new_tokens)),
        *("-npl", ",".join(map(str, counts))),
        *("--output-format", "jsonl"),
        *more,
    ]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(  # noqa: S603 ours
            command,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=tools.environment | WAIT_POLICY | _bench_pins(setting),
            preexec_fn=die_with_parent,
        )
        process.send_signal(signal.SIGSTOP)

        def rate(count: int) -> float:
            too_late = threading.Timer(RUN_S, process.kill)
            too_late.start()
            process.send_signal(signal.SIGCONT)
            try:
                for line in process.stdout or ():
                    if line.startswith("{") and (row := json.loads(line))["pl"] == count:
                        process.send_signal(signal.SIGSTOP)
                        return float(row["speed_tg"])
            finally:
                too_late.cancel()
            said.seek(0)
            raise EngineError(f"llama-batched-bench failed: {said.read()[-1000:]}")

        try:
            yield rate
        finally:
            process.kill()
            process.communicate()


@contextmanager
def server_rate(
    setting: Setting, tools: Tools, *, defaults: bool = False, slot_for_each: bool = True
) -> Iterator[Rate]:
    """Of ``llama-server`` over HTTP with our flags, while all sequences run; or its defaults, from asking to the end.

    It has as many slots as are needed, or as it comes with: sequences for which there are none wait, and their prompts
    lie in its RAM meanwhile. All prompts have been computed before the clock starts; :class:`EngineError` if it does
    not keep them.
    """
    most = max(setting.sequences)
    flags = (
        ["-m", str(setting.gguf), "-c", str(setting.num_cells)] if defaults else _flags(setting) + _server_pins(setting)
    )
    flags += ["-np", str(most)] if slot_for_each else []
    prompts = np.random.default_rng(0).integers(0, 10_000, (most, setting.context_tokens)).tolist()
    environment = tools.environment | ({} if defaults else WAIT_POLICY)
    with _server([str(tools.server), *flags], environment) as url:
        total_slots = int(httpx.get(f"{url}/props", trust_env=False).raise_for_status().json()["total_slots"])
        slots = list(range(most)) if total_slots >= most else [ANY_SLOT] * most
        warm = 0

        def rate(count: int) -> float:
            nonlocal warm
            # One by one: whose slot is taken by another before it is done is not kept.
            for each in range(warm, count):
                _ask_all(url, prompts[each : each + 1], slots[each : each + 1], 1)
            warm = max(warm, count)
            asked_ns = time.monotonic_ns()
            answers = _ask_all(url, prompts[:count], slots[:count], setting.new_tokens)
            streams = [answer.arrivals for answer in answers]
            if not defaults:
                return steady_rate(streams)
            if sum(answer.prompt_tokens for answer in answers) >= setting.context_tokens:
                raise EngineError("llama-server computed prompts again that it was to keep; lower --tokens")
            return whole_rate(asked_ns, streams)

        yield rate


def _flags(setting: Setting) -> list[str]:
    """Our worker's setting as llama.cpp's programs take it."""
    threads, ubatch = str(setting.threads), str(setting.ubatch_tokens)
    return [
        *("-m", str(setting.gguf), "-c", str(setting.num_cells), "-t", threads, "-tb", threads),
        *("-b", ubatch, "-ub", ubatch, "-fa", "on", "-kvu", "-ctk", "f16", "-ctv", "f16"),
        *("-lm", "none"),
    ]


def _bench_pins(setting: Setting) -> dict[str, str]:
    """What pins its threads, by way of the OpenMP runtime: it makes nothing of the flags for that."""
    cpus = _cpus(setting)
    return {"GOMP_CPU_AFFINITY": " ".join(map(str, cpus))} if cpus else {}


def _server_pins(setting: Setting) -> list[str]:
    """Its flags for pinning; by the OpenMP runtime the threads that talk to clients would come to be pinned, too."""
    cpus = _cpus(setting)
    return ["--cpu-mask", hex(sum(1 << cpu for cpu in cpus)), "--cpu-strict", "1"] if cpus else []


def _cpus(setting: Setting) -> tuple[int, ...]:
    """The processors that our worker pins its threads to."""
    topology = numa.read_topology()
    bound = numa.choose("auto", topology)
    node = bound[0] if bound else numa.filled(topology, setting.threads, setting.threads)
    return numa.compute_cpus(node, setting.threads) if node else ()


@contextmanager
def _server(command: list[str], environment: dict[str, str]) -> Iterator[str]:
    (port,) = free_ports(1)
    process = subprocess.Popen(  # noqa: S603 ours
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline_ns = time.monotonic_ns() + int(START_S * 1e9)
        while not _healthy(url):
            if process.poll() is not None or time.monotonic_ns() > deadline_ns:
                raise EngineError(f"llama-server did not start: {' '.join(command)}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(START_S)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _ask_all(url: str, prompts: Sequence[list[int]], slots: Sequence[int], new_tokens: int) -> list[_Answer]:
    """Complete each prompt in its slot, all at once."""
    answers = [_Answer() for _ in prompts]
    failures: list[Exception] = []

    def ask(prompt: list[int], slot: int, told: _Answer) -> None:
        body: dict[str, Any] = {
            "prompt": prompt,
            "id_slot": slot,
            "n_predict": new_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "cache_prompt": True,
            "return_tokens": True,
        }
        try:
            with httpx.stream("POST", f"{url}/completion", json=body, timeout=RUN_S, trust_env=False) as answer:
                for line in answer.raise_for_status().iter_lines():
                    if not line.startswith("data: "):
                        continue
                    said = json.loads(line[6:])
                    if tokens := said.get("tokens"):
                        told.arrivals.append((time.monotonic_ns(), len(tokens)))
                    told.prompt_tokens = said.get("timings", {}).get("prompt_n", 0)
        except (httpx.HTTPError, ValueError) as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=each) for each in zip(prompts, slots, answers, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise EngineError(f"llama-server did not answer: {failures[0]}")
    return answers
