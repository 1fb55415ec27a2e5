"""Result files of a folder, and everything about them that a reader should know before believing a number."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from measurements.result import SCHEMA
from transfer.errors import ConfigError

# The questions that `measure` asks; a report without one of them says so.
MEASURES = ("codec", "link", "prefill", "decode", "proxy", "pool", "fidelity", "crossover", "advise", "ledger")
# Numbers that each summary must have, as far as others are told to rely on them.
REQUIRED = {
    "codec": ("memcpy_gb_per_s", "raw", "q8"),
    "link": ("loopback_raw_gb_per_s", "loopback_raw_vs_zmq"),
    "prefill": ("export_on_vs_off_900", "export_on_vs_off_3500", "tokens_per_s"),
    "decode": ("vs_batched_bench", "vs_llama_server", "itl_p99_handoff_ratio", "bandwidth_vs_stream"),
    "proxy": ("added_ttft_ms_p50", "added_ttft_ms_p99", "throughput_vs_direct", "split_efficiency", "auto_vs_best"),
    "fidelity": ("kl_native",),
    "crossover": ("verdict", "crossover_concurrency", "tokens_per_s", "ttft_s", "goodput_per_s"),
    "pool": ("ttft_vs_cold", "wire_bytes_per_new_token"),
    "advise": ("validation_error_median",),
    "ledger": ("ways", "net_gain_s"),
}
# Of results in which nothing is timed, the load of the machine says nothing.
_UNTIMED = ("advise", "fidelity", "ledger", "pool-kills")
BUSY_LOAD = 0.5
LARGEST_BYTES = 64 << 20
PICTURES = {".png": "image/png", ".svg": "image/svg+xml"}


class Result(NamedTuple):
    """One file that holds a result; ``picture`` is the one of the same name, if there is one."""

    path: Path
    measure: str
    command: str
    environment: dict[str, Any]
    num_samples: int
    summary: dict[str, Any]
    picture: Path | None

    @property
    def commit(self) -> str:
        """The commit without the mark of changed files; empty if it is not known."""
        return str(self.environment.get("commit") or "").removesuffix("+")

    def about(self, part: str) -> dict[str, Any]:
        """A part of the environment, such as ``cpu``; empty where the file has none."""
        found = self.environment.get(part)
        return found if isinstance(found, dict) else {}


class Problem(NamedTuple):
    """Something to know about ``where``: a file's name, or the folder."""

    where: str
    what: str


def collect(folder: Path) -> tuple[list[Result], list[Problem]]:
    """All results in ``folder``, by file name, and what is wrong with them.

    Files that cannot be read as results are problems, not results. Raises :class:`ConfigError` if there is no folder or
    nothing in it is a result.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    results: list[Result] = []
    problems: list[Problem] = []
    for path in sorted(folder.glob("*.json")):
        try:
            results.append(_read(path))
        except ValueError as error:
            problems.append(Problem(path.name, f"left out: {error}"))
    if not results:
        raise ConfigError(f"{folder} holds no result of `isthmus measure`; write some with --json")
    for each in results:
        problems += (Problem(each.path.name, what) for what in _doubts(each))
    return results, problems + [Problem(folder.name, what) for what in _disagreements(results)]


def _read(path: Path) -> Result:
    """Raises :class:`ValueError` saying why the file is no result."""
    if path.stat().st_size > LARGEST_BYTES:
        raise ValueError(f"over {LARGEST_BYTES >> 20} MiB")
    try:
        envelope = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(envelope, dict) or envelope.get("schema") != SCHEMA:
        raise ValueError(f"its schema is not {SCHEMA}")
    parts = {"measure": str, "command": list, "environment": dict, "samples": list, "summary": dict}
    for name, kind in parts.items():
        if not isinstance(envelope.get(name), kind):
            raise ValueError(f"its `{name}` is missing or of another kind")
    if place := next(_not_numbers(envelope["samples"], "samples"), None):
        raise ValueError(f"`{place}` is not a number")
    if place := next(_not_numbers(envelope["summary"], "summary"), None):
        raise ValueError(f"`{place}` is not a number")
    pictures = [path.with_suffix(suffix) for suffix in PICTURES]
    return Result(
        path,
        envelope["measure"],
        " ".join(map(str, envelope["command"])),
        envelope["environment"],
        len(envelope["samples"]),
        envelope["summary"],
        next((picture for picture in pictures if picture.is_file()), None),
    )


def _not_numbers(value: object, place: str) -> Iterator[str]:
    """Where NaN and infinities are."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _not_numbers(each, f"{place}.{key}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _not_numbers(each, f"{place}[{index}]")


def _doubts(each: Result) -> Iterator[str]:
    if not each.num_samples:
        yield "holds no samples"
    if missing := [name for name in REQUIRED.get(each.measure, ()) if each.summary.get(name) is None]:
        yield f"its summary lacks {', '.join(missing)}"
    if not each.commit:
        yield "does not say from which commit it is"
    elif str(each.environment["commit"]).endswith("+"):
        yield f"files differed from commit {each.commit[:9]}"
    load = each.about("load").get("1min")
    if isinstance(load, float) and load > BUSY_LOAD and each.measure not in _UNTIMED:
        yield f"the machine had a load of {load:.2f} before it began"
    if each.picture is None:
        yield "has no picture"
    # What a measurement found wrong with itself.
    problems = each.summary.get("problems")
    yield from map(str, problems if isinstance(problems, list) else ())


def _disagreements(results: Sequence[Result]) -> Iterator[str]:
    by_commit = defaultdict(list)
    for each in results:
        by_commit[each.commit[:9] or "unknown"].append(each.path.name)
    if len(by_commit) > 1:
        groups = "; ".join(f"{commit}: {', '.join(names)}" for commit, names in by_commit.items())
        yield f"results of {len(by_commit)} commits stand side by side, none is averaged with another: {groups}"
    machines = sorted({str(each.about("cpu").get("model", "unknown")) for each in results})
    if len(machines) > 1:
        yield f"results of {len(machines)} machines: {'; '.join(machines)}"
    if missing := [name for name in MEASURES if name not in {each.measure for each in results}]:
        yield f"not measured: {', '.join(missing)}"
