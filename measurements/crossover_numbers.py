"""Cells as numbers with confidence intervals: percentiles, rates, and the best split over the best of the rest.

Intervals are bootstrapped (Efron, "Bootstrap methods: another look at the jackknife", 1979) on two levels: rounds are
drawn with replacement, then requests within each. Ratios draw the same rounds on both sides, as rounds are interleaved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, permutations
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from measurements.crossover_cells import Cell, Timed
from measurements.verdict import WORTH
from measurements.workloads import Workload

# So many that the ends of an interval do not depend on chance by more than 1%.
DRAWS = 4000
_INTERVAL = (2.5, 97.5)

Rounds = dict[int, list[Timed]]
Row = dict[str, Any]
Word = Literal["split", "whole", "even"]
Verdict = Literal["split", "whole", "even", "depends"]
Draws = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


class Advantage(NamedTuple):
    """The best split against the best whole engine or pair of them, by output tokens/s.

    ``low`` and ``high`` bound ``ratio`` with 95%; ``word`` is which pays, ``even`` where noise or less than 5% is all.
    """

    split: str
    other: str
    ratio: float
    low: float
    high: float
    word: Word


def by_round(cells: Iterable[Cell]) -> Rounds:
    """Requests of the cells that count, by round."""
    return {cell.turn: cell.requests for cell in cells if cell.counts and cell.requests}


def row(rounds: Rounds, concurrency: int, workload: Workload) -> Row:
    """Everything about one option at one load. Seconds; rates per second, see :func:`tokens_per_s`.

    All rounds have equally many requests.
    """
    turns = sorted(rounds)
    requests = [request for turn in turns for request in rounds[turn]]
    made: Row = {"requests": len(requests), "rounds": len(rounds)}
    drawn = _draw(len(turns), len(requests) // len(turns), np.random.default_rng(0))
    values = {name: _column(rounds, turns, name) for name in ("ttft_s", "tpot_s", "e2e_s", "output_tokens")}
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        low, high = _interval(np.median(values[name][drawn], axis=1))
        made[name] = _percentiles(values[name].ravel()) | {"p50_low": low, "p50_high": high}
    gaps = [gap for request in requests for gap in request.itl_s]
    made["itl_s"] = _percentiles(gaps) if gaps else None
    good = (values["ttft_s"] <= workload.ttft_slo_s) & (values["tpot_s"] <= workload.tpot_slo_s)
    for name, counted in (("tokens_per_s", values["output_tokens"]), ("goodput_per_s", good.astype(float))):
        made[name] = float(concurrency * counted.sum() / values["e2e_s"].sum())
        drawn_rates = concurrency * counted[drawn].sum(axis=1) / values["e2e_s"][drawn].sum(axis=1)
        made[f"{name}_interval"] = list(_interval(drawn_rates))
    return made


def tokens_per_s(requests: Sequence[Timed], concurrency: int) -> float:
    """Output tokens/s of ``concurrency`` clients that ask again as soon as they are answered.

    Little's law: as many requests at a time over the mean time of one. Unlike tokens over the run's duration it does
    not count clients that have nothing more to ask at the end of a run.
    """
    return concurrency * sum(r.output_tokens for r in requests) / sum(r.e2e_s for r in requests)


def advantage(options: Mapping[str, Rounds], seed: int = 0) -> tuple[Advantage, Draws] | None:
    """Splitting against the rest at one load, and the drawn ratios; None unless both sides have a round in common.

    Loads that are to be independent have a ``seed`` each.
    """
    wholes = [name for name in options if not name.startswith("split") and name != "auto" and options[name]]
    splits = [name for name in options if name.startswith("split") and options[name]]
    if not wholes or not splits:
        return None
    turns = sorted(set.intersection(*(set(options[name]) for name in (*wholes, *splits))))
    if not turns:
        return None
    chosen = np.random.default_rng(seed)
    picked = chosen.integers(0, len(turns), (DRAWS, len(turns)))
    rates: dict[str, float] = {}
    drawn_rates: dict[str, Draws] = {}
    for name in (*wholes, *splits):
        tokens, seconds = (_column(options[name], turns, what) for what in ("output_tokens", "e2e_s"))
        drawn = _draw_within(picked, tokens.shape[1], chosen)
        rates[name] = float(tokens.sum() / seconds.sum())
        drawn_rates[name] = tokens[drawn].sum(axis=1) / seconds[drawn].sum(axis=1)
    split, other = (max(names, key=lambda name: rates[name]) for names in (splits, wholes))
    # Who is best is drawn again as well.
    ours, theirs = (np.max([drawn_rates[name] for name in names], axis=0) for names in (splits, wholes))
    ratios: Draws = ours / theirs
    ratio = rates[split] / rates[other]
    low, high = _interval(ratios)
    return Advantage(split, other, ratio, low, high, word(ratio, low, high)), ratios


def word(ratio: float, low: float, high: float) -> Word:
    """Who wins, if by more than 5% and more than noise."""
    if ratio >= WORTH and low > 1:
        return "split"
    return "whole" if ratio <= 1 / WORTH and high < 1 else "even"


class Overall(NamedTuple):
    """The geometric mean of a workload's ratios over its loads, bounded with 95%, and the verdict.

    ``depends``: splitting wins at one load and loses at another; their mean says nothing then.
    ``repeats`` is the share of further measurements like this one that would come to the same verdict.
    """

    ratio: float
    low: float
    high: float
    word: Verdict
    repeats: float


def overall(found: Sequence[tuple[Advantage, Draws]]) -> Overall:
    """One answer for a workload. Loads were measured one after another, so their draws are independent."""
    logs, drawn = np.log([[each.ratio] for each, _ in found]), np.log([draws for _, draws in found])
    ratio, draws = float(np.exp(logs.mean())), np.exp(drawn.mean(axis=0))
    low, high = _interval(draws)
    noise = _noise(logs, drawn)
    (depends,) = _depends(logs, noise)
    said: Verdict = "depends" if depends else word(ratio, low, high)
    # What another measurement finds is spread around this one as the draws are around their median.
    others = _depends(logs + drawn - np.median(drawn, axis=1, keepdims=True), noise)
    means = [word(ratio * moved, low * moved, high * moved) for moved in draws / float(np.median(draws))]
    repeats = np.mean([("depends" if turns else mean) == said for turns, mean in zip(others, means, strict=True)])
    return Overall(ratio, low, high, said, float(repeats))


def _noise(logs: Draws, drawn: Draws) -> Draws:
    """By how much a load may be ahead of another by chance, 95%: ``[loads, loads]``, in logarithms."""
    lowest = np.array([[np.percentile(one - other, _INTERVAL[0]) for other in drawn] for one in drawn])
    noise: Draws = logs - logs.T - lowest
    return noise


def _depends(logs: Draws, noise: Draws) -> npt.NDArray[np.bool_]:
    """Of measurements ``[loads, measurements]``: whether splitting wins by 5% at one load and loses by 5% at another,
    and the two are further apart than by chance.
    """
    worth = float(np.log(WORTH))
    pairs = permutations(range(len(logs)), 2)
    turns = [
        (logs[one] >= worth) & (logs[other] <= -worth) & (logs[one] - logs[other] > noise[one, other])
        for one, other in pairs
    ]
    return np.any(turns, axis=0) if turns else np.zeros(logs.shape[1], np.bool_)


class Crossing(NamedTuple):
    """Where splitting starts or stops paying: between two measured points, ``at`` by interpolation over logarithms.

    ``clear`` if each side wins at its own point by more than noise.
    """

    turn: Literal["starts", "stops"]
    low: int
    high: int
    at: float
    clear: bool


def crossings(points: Mapping[int, Advantage]) -> list[Crossing]:
    """Where the ratio passes 1 along a measured quantity (concurrency, prompt tokens)."""
    found: list[Crossing] = []
    known = sorted(points)
    for low, high in pairwise(known):
        before, after = np.log(points[low].ratio), np.log(points[high].ratio)
        if (before < 0) == (after < 0):
            continue
        share = before / (before - after)
        at = float(np.exp(np.log(low) + share * (np.log(high) - np.log(low))))
        clear = {points[low].word, points[high].word} == {"split", "whole"}
        found.append(Crossing("starts" if after > before else "stops", low, high, at, clear))
    return found


def drift(rounds: Rounds, concurrency: int) -> float:
    """The fastest round over the slowest, by tokens/s."""
    rates = [tokens_per_s(requests, concurrency) for requests in rounds.values()]
    return max(rates) / min(rates)


def _column(rounds: Rounds, turns: Sequence[int], name: str) -> Draws:
    """One number of every request: ``[rounds, requests]``."""
    return np.array([[getattr(request, name) for request in rounds[turn]] for turn in turns], float)


def _draw(num_rounds: int, num_requests: int, chosen: np.random.Generator) -> tuple[Indices, Indices]:
    """Indices into ``[rounds, requests]`` of every draw's requests: two of ``[DRAWS, rounds * requests]``."""
    return _draw_within(chosen.integers(0, num_rounds, (DRAWS, num_rounds)), num_requests, chosen)


def _draw_within(picked: Indices, num_requests: int, chosen: np.random.Generator) -> tuple[Indices, Indices]:
    """The same, of rounds that are drawn already."""
    requests = chosen.integers(0, num_requests, (DRAWS, picked.shape[1] * num_requests))
    return np.repeat(picked, num_requests, axis=1), requests


def _percentiles(values: Sequence[float] | Draws) -> dict[str, float]:
    return dict(zip(("p50", "p90", "p99"), map(float, np.percentile(values, [50, 90, 99])), strict=True))


def _interval(values: Draws) -> tuple[float, float]:
    low, high = np.percentile(values, _INTERVAL)
    return float(low), float(high)


def grouped(cells: Iterable[Cell]) -> dict[tuple[str, int], dict[str, Rounds]]:
    """Rounds by workload and concurrency, then by option; only cells that count."""
    cells_of: dict[tuple[str, int], dict[str, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        cells_of[cell.workload, cell.concurrency][cell.option].append(cell)
    return {
        place: {option: by_round(found) for option, found in options.items()} for place, options in cells_of.items()
    }
