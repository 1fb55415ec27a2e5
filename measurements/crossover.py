"""Is splitting worth it here? The same hardware used whole, twice over, split and by the router, under real load."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from isthmus.up import cluster_on_free_ports
from measurements import crossover_summary, crossover_validation, result
from measurements.crossover_cells import Cell, Cells, Timed
from measurements.crossover_plan import OPTIONS, REPLICATED, Place, Plan, fitting
from measurements.crossover_stack import OwnStack, RunningStack
from measurements.host_watch import HostWatch, between
from measurements.load_generator import Ask, Generator
from transfer.config import Cluster, Pair
from transfer.errors import EngineError, IsthmusError

AnyStack = OwnStack | RunningStack

# A stack of our own that dies is brought up again so often.
RESTARTS = 2
WARM_UP = Ask(requests=2, concurrency=2, prompt_tokens=32, output_tokens=4)
WARM_UP_S = 180.0


class Where(NamedTuple):
    """The stack to measure: ``url`` of one that runs, with a second proxy that replicates, or one of our own."""

    cluster: Cluster
    url: str | None = None
    replicated_url: str | None = None

    def describe(self) -> list[str]:
        """What tells results of one stack and model from those of another."""
        return [self.url or "own", self.replicated_url or "", self.cluster.pair.name, self.cluster.pair.gguf]


def run(plan: Plan, where: Where, work: Path, json: Path | None, plot: Path | None) -> None:
    """Measure ``plan`` at ``where``; finished runs are files in ``work``, and a rerun goes on behind them.

    Prints tables and the verdict, writes ``json`` and draws ``plot`` if given. Raises :class:`ConfigError` for what is
    not installed, cannot be written, or does not fit, and, once what there is has been written, the error that ended
    the measurement early.
    """
    if plot is not None:
        # Fail before measuring, not after.
        import matplotlib as _  # noqa: F401
    environment = result.environment()
    if where.url and not where.replicated_url:
        plan = plan.without(REPLICATED)
    plan, notes = fitting(plan, min(where.cluster.prefill.max_model_len - 1, where.cluster.decode.num_cells))
    cells = Cells(work, environment["commit"] or "unknown", plan, plan.fingerprint(where.describe()))
    watch = HostWatch()
    console = Console(stderr=True)
    failure: IsthmusError | None = None
    try:
        measure(plan, where, cells, watch, console, notes.append)
    except IsthmusError as error:
        failure = error
        notes.append(f"ended early: {error}")
    found = sorted(cells, key=lambda cell: cell.name)
    if not any(cell.counts for cell in found):
        raise failure or EngineError(f"no run counted: {found[0].why if found else 'there was none'}")
    summary = crossover_summary.summarize(plan, found)
    summary["problems"] = [*cells.problems, *notes, *crossover_summary.problems(plan, found)]
    summary["energy"] = watch.why_no_energy or "counted on this host"
    summary["stack"] = {"own": where.url is None, "model": where.cluster.pair.name}
    workloads = [load.workload for load in plan.loads]
    summary["validation"] = crossover_validation.validate(where.cluster.pair.name, where.url is None, workloads, found)
    if json is not None:
        result.write(json, "crossover", environment, [sample(cell) for cell in found], summary)
    if plot is not None:
        from measurements.crossover_plot import draw

        draw(summary, plot)
    show(summary, Console())
    if failure is not None:
        raise failure


def measure(
    plan: Plan, where: Where, cells: Cells, watch: HostWatch, console: Console, note: Callable[[str], None]
) -> None:
    """Run what ``cells`` lacks; ``note`` is told what went wrong on the way."""
    todo = [[place for place in plan.places(turn) if not cells.finished(place)] for turn in range(plan.rounds)]
    if not any(todo):
        return
    folder = Path(tempfile.mkdtemp(prefix="isthmus-crossover-"))
    console.print(f"finished runs go to {cells.folder}, logs to {folder}", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    began_s = time.monotonic()
    with Progress(*columns, console=console) as progress, Generator(folder / "generator.log") as generator:
        task = progress.add_task("starting", total=sum(map(len, todo)))

        def around(place: Place, stack: AnyStack) -> Cell:
            progress.update(task, description=_description(place))
            cell = measure_one(place, stack, generator, watch, plan, folder)
            progress.advance(task)
            return cell

        restarts = 0
        while True:
            try:
                with _stack(where, folder, console) as stack:
                    progress.update(task, description="warming up")
                    warm_up(stack, generator, plan, folder)
                    if late := _rounds(plan, todo, cells, stack, around, began_s):
                        note(late)
                    break
            except EngineError as error:
                if where.url or restarts == RESTARTS or not _anything(cells):
                    raise
                restarts += 1
                note(f"the stack was brought up again: {str(error).splitlines()[0]}")
                todo = [[place for place in places if not cells.finished(place)] for places in todo]
    shutil.rmtree(folder, ignore_errors=True)


def _rounds(
    plan: Plan,
    todo: Sequence[Sequence[Place]],
    cells: Cells,
    stack: AnyStack,
    one: Callable[[Place, AnyStack], Cell],
    began_s: float,
) -> str | None:
    """Every round that still ends in time; one that is begun is finished. Returns why not all were run, if so."""
    took_s = {(cell.workload, cell.concurrency, cell.option): cell.seconds for cell in cells if cell.counts}
    for turn, places in enumerate(todo):
        will_take_s = sum(took_s.get(_what(place), 0.0) for place in places)
        if turn and (time.monotonic() - began_s + will_take_s) / 60 > plan.minutes:
            return f"no time was left for round {turn + 1} within {plan.minutes:g} minutes"
        for place in places:
            cell = one(place, stack)
            took_s[_what(place)] = cell.seconds
            commit, fingerprint = cells.marks
            cells.add(msgspec.structs.replace(cell, commit=commit, plan=fingerprint))
            if not cell.counts:
                stack.require_alive()
    return None


def _what(place: Place) -> tuple[str, int, str]:
    return place.load.workload.name, place.load.concurrency, place.option


def measure_one(
    place: Place, stack: AnyStack, generator: Generator, watch: HostWatch, plan: Plan, folder: Path
) -> Cell:
    """One run of the generator; a run that fails is a cell that does not count and says why."""
    load, workload = place.load, place.load.workload
    ask = Ask(
        requests=load.requests,
        concurrency=load.concurrency,
        prompt_tokens=workload.prompt_tokens,
        output_tokens=workload.output_tokens,
        shared_tokens=workload.shared_tokens,
        # Tokens that nobody has in a cache.
        seed=secrets.randbelow(1 << 31),
        headers=OPTIONS[place.option],
    )
    before, began_s = watch.read(), time.monotonic()
    why, requests = "", []
    try:
        requests = generator.run(stack.target(place.option), ask, folder / "run.json", plan.cell_s)
    except EngineError as error:
        why = str(error)
    meanwhile = between(before, watch.read())
    if meanwhile.throttled:
        why = why or f"the processor throttled itself {meanwhile.throttled} times"
    return Cell(
        commit="",
        plan="",
        turn=place.turn,
        workload=workload.name,
        concurrency=load.concurrency,
        option=place.option,
        why=why,
        requests=[Timed(**request._asdict()) for request in requests],
        seed=ask.seed,
        seconds=time.monotonic() - began_s,
        energy_j=meanwhile.energy_j,
        steal_share=max(meanwhile.steal_share, 0.0),
        throttled=meanwhile.throttled,
    )


def warm_up(stack: AnyStack, generator: Generator, plan: Plan, folder: Path) -> None:
    """A small run by every option, not counted: first requests load what later ones find."""
    for option in dict.fromkeys(option for load in plan.loads for option in load.options):
        ask = WARM_UP._replace(headers=OPTIONS[option], seed=secrets.randbelow(1 << 31))
        generator.run(stack.target(option), ask, folder / "warm-up.json", WARM_UP_S)


def _stack(where: Where, folder: Path, console: Console) -> AbstractContextManager[AnyStack]:
    if where.url:
        return RunningStack(where.url, where.replicated_url, where.cluster.pair)
    return OwnStack(where.cluster, Path(tempfile.mkdtemp(prefix="stack-", dir=folder)), console)


def work_folder(plan: Plan, where: Where) -> Path:
    """Where finished runs of ``plan`` are kept unless told otherwise: under the user's cache, by what is measured."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    commit = (result.environment()["commit"] or "unknown")[:12]
    return cache / "isthmus" / "crossover" / f"{commit}-{plan.fingerprint(where.describe())}"


def cluster_for(plan: Plan, pair: Pair) -> Cluster:
    """The default cluster on free ports of loopback, with room for the largest of ``plan`` and no parity guard.

    Its comparisons of one way's answers would run while the next way is measured.
    """
    cluster = cluster_on_free_ports(pair)
    longest = max(load.tokens for load in plan.loads) + 1
    most = max(load.concurrency for load in plan.loads)
    return msgspec.structs.replace(
        cluster,
        prefill=msgspec.structs.replace(cluster.prefill, max_model_len=max(longest, cluster.prefill.max_model_len)),
        decode=msgspec.structs.replace(cluster.decode, max_sequences=max(most, cluster.decode.max_sequences)),
        proxy=msgspec.structs.replace(
            cluster.proxy, max_running=max(most, cluster.proxy.max_running), parity_share=0.0
        ),
    )


def sample(cell: Cell) -> dict[str, Any]:
    """A cell for the result file; gaps between tokens as percentiles, for the files of the runs have them all."""
    built: dict[str, Any] = msgspec.to_builtins(cell)
    for name in ("schema", "commit", "plan"):
        del built[name]
    for request in built["requests"]:
        gaps = sorted(request.pop("itl_s"))
        request["itl_p50_s"] = gaps[len(gaps) // 2] if gaps else None
        request["itl_max_s"] = gaps[-1] if gaps else None
    return built


def show(summary: dict[str, Any], console: Console) -> None:
    """Tables and verdicts for people."""
    for name, made in summary["workloads"].items():
        console.print(table(name, made))
    if sweep := summary.get("prompt_length"):
        console.print(sweep_table(sweep))
    for line in crossover_summary.sentences(summary):
        console.print(line, highlight=False, soft_wrap=True)
    if why := summary["validation"].get("why"):
        console.print(f"not compared with a simulation: {why}", highlight=False, soft_wrap=True)
    else:
        console.print(crossover_validation.table(summary["validation"]))
    console.print(f"energy: {summary['energy']}", highlight=False, soft_wrap=True)
    for problem in summary["problems"]:
        console.print(f"[yellow]note[/]: {problem}", highlight=False, soft_wrap=True)


def table(name: str, made: dict[str, Any]) -> Table:
    """One workload: medians by concurrency and option."""
    shape = made["workload"]
    title = f"{name}: {shape['prompt_tokens']} tokens in, {shape['output_tokens']} out"
    shown = Table(title=title, title_justify="left")
    for column in ("at", "option", "TTFT, ms", "TPOT, ms", "end to end, s", "tokens/s (95%)", "good/min"):
        shown.add_column(column, justify="left" if column == "option" else "right", no_wrap=column != "option")
    for at in dict.fromkeys(at for rows in made["options"].values() for at in rows):
        shown.add_section()
        label = at
        for option, rows in made["options"].items():
            if row := rows.get(at):
                low, high = row["tokens_per_s_interval"]
                shown.add_row(
                    label,
                    option,
                    f"{row['ttft_s']['p50'] * 1e3:,.0f}",
                    f"{row['tpot_s']['p50'] * 1e3:,.1f}",
                    f"{row['e2e_s']['p50']:.2f}",
                    f"{row['tokens_per_s']:,.1f} ({low:,.1f} to {high:,.1f})",
                    f"{row['goodput_per_s'] * 60:,.1f}",
                )
                label = ""
    return shown


def sweep_table(sweep: dict[str, Any]) -> Table:
    """End to end of one request by prompt length."""
    options = list(dict.fromkeys(option for rows in sweep["options"].values() for option in rows))
    shown = Table(title="one request at a time, by prompt tokens: median end to end", title_justify="left")
    for column in ("prompt", *options, "split / best other"):
        shown.add_column(column, justify="right", no_wrap=True)
    for tokens, rows in sweep["options"].items():
        cells = [f"{rows[o]['1']['e2e_s']['p50']:.2f} s" if o in rows else "" for o in options]
        gain = sweep["gain"].get(tokens)
        shown.add_row(tokens, *cells, f"x{gain['ratio']:.2f}" if gain else "")
    return shown


def _description(place: Place) -> str:
    load = place.load
    return f"round {place.turn + 1}: {load.workload.name} at {load.concurrency}, {place.option}"


def _anything(cells: Cells) -> bool:
    return any(cell.counts for cell in cells)
