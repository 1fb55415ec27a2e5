"""What cells amount to: a verdict for each workload, where splitting starts and stops paying, and what to distrust."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from measurements import crossover_numbers as numbers
from measurements.crossover_cells import Cell
from measurements.crossover_numbers import Advantage, Crossing, Draws, Rounds
from measurements.crossover_plan import SWEEP, Load, Plan

# The verdict's words for people.
SAYS = {
    "split": "split",
    "whole": "do not split",
    "even": "no clear difference",
    "depends": "it depends",
}
# Of one load by one option: rounds that differ by more, and time that others took of this host's processor.
_DRIFT = 1.5
_STEAL = 0.05

Summary = dict[str, Any]


def summarize(plan: Plan, cells: Sequence[Cell]) -> Summary:
    """Numbers by workload, concurrency and option; verdicts; nothing of cells that do not count."""
    grouped = numbers.grouped(cells)
    loads = {(load.workload.name, load.concurrency): load for load in plan.loads}
    workloads: dict[str, Summary] = {}
    swept: dict[int, dict[str, Any]] = {}
    against: dict[str, dict[int, tuple[Advantage, Draws]]] = {}
    for seed, (place, load) in enumerate(loads.items()):
        options = grouped.get(place, {})
        runs = [cell for cell in cells if (cell.workload, cell.concurrency) == place]
        rows = {
            option: _row(rounds, load, [cell for cell in runs if cell.option == option])
            for option in load.options
            if (rounds := options.get(option))
        }
        found = numbers.advantage({option: options.get(option, {}) for option in load.options}, seed)
        if load.workload.name.startswith(SWEEP):
            against.setdefault(SWEEP, {}).update({load.workload.prompt_tokens: found} if found else {})
            swept[load.workload.prompt_tokens] = rows
        else:
            against.setdefault(load.workload.name, {}).update({load.concurrency: found} if found else {})
            workload = workloads.setdefault(load.workload.name, {"workload": load.workload._asdict(), "options": {}})
            for option, row in rows.items():
                workload["options"].setdefault(option, {})[str(load.concurrency)] = row
    for name, made in workloads.items():
        made |= _verdict(against.get(name, {})) | {"auto_vs_best": _auto_vs_best(made["options"])}
    summary: Summary = {
        "profile": plan.profile,
        "verdict": {name: made["verdict"] for name, made in workloads.items()},
        "crossover_concurrency": {name: made["crossover"] for name, made in workloads.items()},
        **{what: _flat(workloads, what) for what in ("tokens_per_s", "goodput_per_s", "ttft_s", "tpot_s")},
        "workloads": workloads,
    }
    if swept:
        by_tokens = {
            str(tokens): {option: {"1": row} for option, row in rows.items()} for tokens, rows in swept.items()
        }
        summary["prompt_length"] = {"options": by_tokens} | _verdict(against[SWEEP])
        summary["crossover_prompt_tokens"] = summary["prompt_length"]["crossover"]
    return summary


def _row(rounds: Rounds, load: Load, runs: Sequence[Cell]) -> numbers.Row:
    """A row with this host's joules for an output token, None where they are not counted."""
    counted = [cell for cell in runs if cell.counts]
    spent = [sum(cell.energy_j.values()) for cell in counted if cell.energy_j]
    tokens = sum(request.output_tokens for cell in counted for request in cell.requests)
    energy = sum(spent) / tokens if tokens and len(spent) == len(counted) else None
    return numbers.row(rounds, load.concurrency, load.workload) | {"energy_j_per_token": energy}


def _verdict(found: Mapping[int, tuple[Advantage, Draws]]) -> Summary:
    if not found:
        return {"verdict": "not measured", "gain": {}, "overall": None, "crossover": []}
    whole = numbers.overall(list(found.values()))
    points = {at: each for at, (each, _) in found.items()}
    return {
        "verdict": SAYS[whole.word],
        "gain": {str(at): each._asdict() for at, each in sorted(points.items())},
        "overall": whole._asdict(),
        "crossover": [each._asdict() for each in numbers.crossings(points)],
    }


def _flat(workloads: Mapping[str, Summary], what: str) -> dict[str, dict[str, float]]:
    """One number by workload and concurrency, then by option; medians of what has percentiles."""
    flat: dict[str, dict[str, float]] = {}
    for name, made in workloads.items():
        for option, rows in made["options"].items():
            for at, row in rows.items():
                value = row[what]
                flat.setdefault(f"{name}, {at}", {})[option] = value["p50"] if isinstance(value, dict) else value
    return flat


def _auto_vs_best(options: Mapping[str, Mapping[str, numbers.Row]]) -> dict[str, float]:
    """Tokens/s that `auto` has over the best of all others, by concurrency."""
    return {
        at: row["tokens_per_s"] / max(others)
        for at, row in options.get("auto", {}).items()
        if (others := [rows[at]["tokens_per_s"] for name, rows in options.items() if name != "auto" and at in rows])
    }


def problems(plan: Plan, cells: Sequence[Cell]) -> Iterator[str]:
    """What to know before believing the numbers: runs that failed or are missing, rounds that disagree, a busy host."""
    for cell in cells:
        if not cell.counts:
            yield f"not counted: {cell}: {cell.why}"
        elif cell.steal_share > _STEAL:
            yield f"{cell}: others took {cell.steal_share:.0%} of this host's processor"
    turns = sorted({cell.turn for cell in cells if cell.counts})
    for turn in turns:
        expected = sum(1 for _ in plan.places(turn))
        if missing := expected - sum(cell.counts and cell.turn == turn for cell in cells):
            yield f"round {turn + 1} lacks {missing} of {expected} runs"
    if len(turns) < plan.rounds:
        yield f"{len(turns)} of {plan.rounds} rounds were measured"
    for (workload, concurrency), options in numbers.grouped(cells).items():
        for option, rounds in options.items():
            if rounds and (apart := numbers.drift(rounds, concurrency)) > _DRIFT:
                yield f"{option}, {workload} at {concurrency}: the fastest round has x{apart:.2f} the slowest"


def sentences(summary: Summary) -> Iterator[str]:
    """The verdict for people."""
    for name, made in summary["workloads"].items():
        yield f"{name}: {_sentence(made, 'concurrent requests')}"
    if sweep := summary.get("prompt_length"):
        yield f"one request, longer and longer prompts: {_sentence(sweep, 'tokens')}"


def _sentence(made: Summary, unit: str) -> str:
    whole = made["overall"]
    if whole is None:
        return "not measured"
    best = max(made["gain"].values(), key=lambda each: each["ratio"])
    at = next(at for at, each in made["gain"].items() if each is best)
    text = (
        f"{made['verdict']}: x{whole['ratio']:.2f} the tokens/s of the best other way ({whole['low']:.2f} to"
        f" {whole['high']:.2f}{_repeats(whole)}); at best {best['split']} x{best['ratio']:.2f} of {best['other']}"
        f" at {at} {unit}"
    )
    crossings = [Crossing(**each) for each in made["crossover"]]
    if not crossings:
        ratios = [each["ratio"] for each in made["gain"].values()]
        return f"{text}; no crossover, splitting is {'ahead' if min(ratios) > 1 else 'behind'} at every point measured"
    return text + "".join(f"; {_crossing(each, unit)}" for each in crossings)


def _repeats(whole: Summary) -> str:
    """How sure the verdict is; older results do not say."""
    return f"; {whole['repeats']:.0%} of such measurements would say so" if "repeats" in whole else ""


def _crossing(each: Crossing, unit: str) -> str:
    doubt = "" if each.clear else ", within noise"
    return f"{each.turn} paying between {each.low} and {each.high} {unit} (about {each.at:,.0f}{doubt})"
