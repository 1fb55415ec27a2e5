"""Finished runs of ``measure crossover`` as files, so that an interrupted measurement goes on; strangers among them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from measurements.crossover_plan import Place, Plan
from transfer.errors import ConfigError

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Tokens = Annotated[int, msgspec.Meta(ge=1)]


class Timed(msgspec.Struct, frozen=True, kw_only=True):
    """One request as the load generator saw it."""

    began_s: float
    ttft_s: Annotated[float, msgspec.Meta(gt=0)]
    e2e_s: Annotated[float, msgspec.Meta(gt=0)]
    itl_s: list[Seconds] = []
    prompt_tokens: Tokens
    output_tokens: Tokens

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.e2e_s - self.ttft_s) / max(self.output_tokens - 1, 1)


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One run: a workload at a concurrency by one option, in one round. ``why`` says why it is not to be counted.

    ``plan`` is :meth:`Plan.fingerprint`. ``energy_j`` is this host's by counter; ``steal_share`` is the share of its
    CPU time that its hypervisor gave to others; ``throttled`` how often its processor slowed itself down.
    """

    schema: Literal["isthmus.crossover-cell/1"] = "isthmus.crossover-cell/1"
    commit: str
    plan: str
    turn: int
    workload: str
    concurrency: int
    option: str
    why: str = ""
    requests: list[Timed] = []
    seed: int = 0
    seconds: Seconds = 0.0
    energy_j: dict[str, float] | None = None
    steal_share: float = 0.0
    throttled: int | None = None

    @property
    def counts(self) -> bool:
        """Whether it goes into any number."""
        return not self.why

    @property
    def name(self) -> str:
        """The stem of its file."""
        return _name(self.turn, self.workload, self.concurrency, self.option)

    def __str__(self) -> str:
        return f"{self.option}, {self.workload} at {self.concurrency}, round {self.turn + 1}"


class Cells:
    """The cells in a folder that belong to this commit and plan (``marks``). ``problems`` names files that do not."""

    def __init__(self, folder: Path, commit: str, plan: Plan, fingerprint: str) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self.marks = (commit, fingerprint)
        self._known: dict[str, Cell] = {}
        expected = {name_of(place) for turn in range(plan.rounds) for place in plan.places(turn)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files = sorted(folder.glob("*.cell.json"))
        except OSError as error:
            raise ConfigError(f"cannot keep results in {folder}: {error.strerror} - at --work") from None
        for file in files:
            self._take(file, expected)

    def finished(self, place: Place) -> bool:
        """Whether this run is there and counts."""
        cell = self._known.get(name_of(place))
        return cell is not None and cell.counts

    def add(self, cell: Cell) -> None:
        """Keep ``cell``, on disk as well: whole, or not at all."""
        path = self.folder / f"{cell.name}.cell.json"
        unfinished = path.with_suffix(".part")
        try:
            unfinished.write_bytes(msgspec.json.encode(cell))
            unfinished.replace(path)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror} - at --work") from None
        self._known[cell.name] = cell

    def __iter__(self) -> Iterator[Cell]:
        return iter(self._known.values())

    def _take(self, file: Path, expected: set[str]) -> None:
        try:
            cell = msgspec.json.decode(file.read_bytes(), type=Cell)
        except (OSError, msgspec.DecodeError) as error:
            self.problems.append(f"{file.name} is left out: {error}")
            return
        if cell.commit != self.marks[0]:
            self.problems.append(f"{file.name} is left out: it is of commit {cell.commit[:9]}, this is another")
        elif cell.plan != self.marks[1] or file.name != f"{cell.name}.cell.json" or cell.name not in expected:
            self.problems.append(f"{file.name} is left out: it is of another plan, stack or model")
        else:
            self._known[cell.name] = cell


def name_of(place: Place) -> str:
    """The stem of the file of ``place``."""
    return _name(place.turn, place.load.workload.name, place.load.concurrency, place.option)


def _name(turn: int, workload: str, concurrency: int, option: str) -> str:
    return "-".join(re.sub(r"\W+", "_", part) for part in (str(turn + 1), workload, str(concurrency), option))
