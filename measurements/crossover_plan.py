"""What ``measure crossover`` runs: workloads at numbers of requests, by every way to serve them, in rounds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from measurements.workloads import QUICK_WORKLOADS, WORKLOADS, Workload
from transfer.errors import ConfigError

ROUTE, CODEC = "X-Isthmus-Route", "X-Isthmus-Codec"
REPLICATED = "replicated"
SPLIT_CODECS = ("raw", "q8")
# Ways to serve a request, with the headers that ask for them; `replicated` is what another proxy does unasked.
OPTIONS: dict[str, tuple[str, ...]] = {
    "gpu": (f"{ROUTE}=gpu",),
    "cpu": (f"{ROUTE}=cpu",),
    REPLICATED: (),
    **{f"split {codec}": (f"{ROUTE}=split", f"{CODEC}={codec}") for codec in SPLIT_CODECS},
    "auto": (f"{ROUTE}=auto",),
}
# Of the sweep over prompt lengths, in which one request runs at a time.
SWEEP = "prompt length"
SWEPT = ("gpu", "cpu", *(f"split {codec}" for codec in SPLIT_CODECS))
SWEEP_OUTPUT_TOKENS = 16


class Load(NamedTuple):
    """``requests`` of a workload, ``concurrency`` at a time, by each of ``options``, in the first ``rounds`` rounds."""

    workload: Workload
    concurrency: int
    requests: int
    options: tuple[str, ...] = tuple(OPTIONS)
    rounds: int = 1_000

    @property
    def tokens(self) -> int:
        """Room that one request needs."""
        return self.workload.prompt_tokens + self.workload.output_tokens


class Place(NamedTuple):
    """One run of the generator: which load, by which option, in which round."""

    turn: int
    load: Load
    option: str


class Plan(NamedTuple):
    """All loads, run ``rounds`` times at most. After ``minutes`` no further round begins that would not end in time.

    ``cell_s`` is when a run of the generator is given up.
    """

    profile: str
    loads: tuple[Load, ...]
    rounds: int
    minutes: float
    cell_s: float

    def fingerprint(self, about: Sequence[str]) -> str:
        """Tells results of this plan, and of ``about`` (the stack and its model), from others."""
        loads = [[*load.workload, load.concurrency, load.requests, load.options, load.rounds] for load in self.loads]
        return hashlib.blake2b(json.dumps([loads, list(about)]).encode(), digest_size=8).hexdigest()

    def places(self, turn: int) -> Iterator[Place]:
        """One round, in order: options take turns at a load, and who begins shifts with load and round."""
        for index, load in enumerate(self.loads):
            if turn >= load.rounds:
                continue
            shift = (turn + index) % len(load.options)
            for option in load.options[shift:] + load.options[:shift]:
                yield Place(turn, load, option)

    def without(self, option: str) -> Plan:
        """The same without one of the ways."""
        loads = tuple(load._replace(options=tuple(o for o in load.options if o != option)) for load in self.loads)
        return self._replace(loads=loads)


def quick() -> Plan:
    """For the embedded pair on two cores: within a quarter of an hour.

    Few requests at a time are the noisiest and the cheapest, so they have a round more.
    """
    concurrencies = {"long document": (1, 4, 16), "burst": (4, 16)}
    loads = [
        Load(
            workload,
            concurrency,
            _requests(workload, concurrency, 2 if concurrency < 4 else 1),
            rounds=3 if concurrency < 16 else 2,
        )
        for workload in QUICK_WORKLOADS
        for concurrency in concurrencies.get(workload.name, (1, 4, 16))
    ]
    return Plan("quick", (*loads, *_sweep((32, 128, 512, 1024))), rounds=3, minutes=14.5, cell_s=240.0)


def full() -> Plan:
    """The workloads as ``advise`` simulates them, at 1 to 32 requests, three rounds: hours on a small machine."""
    loads = [
        Load(workload, concurrency, _requests(workload, concurrency, 3))
        for workload in WORKLOADS
        for concurrency in (1, 2, 4, 8, 16, 32)
    ]
    sweep = _sweep((64, 256, 1024, 2048, 4096, 7000))
    return Plan("full", (*loads, *sweep), rounds=3, minutes=float("inf"), cell_s=3600.0)


def _requests(workload: Workload, concurrency: int, a_client: int) -> int:
    """A burst is one: all at once, and the round is over when the last is done."""
    return concurrency if workload.together else concurrency * a_client


def _sweep(lengths: Sequence[int]) -> list[Load]:
    return [Load(sweep_workload(tokens), 1, 1, SWEPT) for tokens in lengths]


def sweep_workload(prompt_tokens: int) -> Workload:
    """One point of the sweep; nobody has promised anything about it."""
    return Workload(f"{SWEEP} {prompt_tokens}", prompt_tokens, SWEEP_OUTPUT_TOKENS, 1e9, 1e9, spread=0.0)


def only(plan: Plan, names: Sequence[str], concurrencies: Sequence[int], rounds: int | None) -> Plan:
    """``plan`` with the workloads and concurrencies that are named, all where none are; the sweep goes by its name.

    Raises :class:`ConfigError` naming the workloads that there are.
    """
    named = {load: SWEEP if load.workload.name.startswith(SWEEP) else load.workload.name for load in plan.loads}
    if unknown := [name for name in names if name not in named.values()]:
        known = ", ".join(dict.fromkeys(named.values()))
        raise ConfigError(f"there is no workload {unknown[0]!r}; there are {known} - at --workload")
    loads = tuple(
        load
        for load, name in named.items()
        if (not names or name in names) and (not concurrencies or load.concurrency in concurrencies or name == SWEEP)
    )
    if not loads:
        raise ConfigError(f"profile {plan.profile} has none of these numbers of requests - at --concurrency")
    return plan._replace(loads=loads, rounds=rounds or plan.rounds)


def fitting(plan: Plan, longest_tokens: int) -> tuple[Plan, list[str]]:
    """``plan`` without what has no room in a context of ``longest_tokens``, and a line for each load that is left out.

    Raises :class:`ConfigError` if nothing is left.
    """
    loads = tuple(load for load in plan.loads if load.tokens <= longest_tokens)
    if not loads:
        raise ConfigError(f"no workload has room in a context of {longest_tokens} tokens; raise max_model_len")
    dropped = dict.fromkeys(load.workload.name for load in plan.loads if load not in loads)
    return plan._replace(loads=loads), [f"left out: {name} does not fit {longest_tokens} tokens" for name in dropped]
