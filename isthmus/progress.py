"""What a person sees while the stack comes up: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from isthmus.children import ChildView

Show = Callable[[list[ChildView]], None]


@contextmanager
def starting(console: Console) -> Iterator[Show]:
    """Yield a function that shows the children's state each time it is called."""
    if not console.is_terminal:
        yield _PlainLines(console).show
        return
    spinner = Spinner("dots", style="cyan")
    with Live(console=console, refresh_per_second=10) as live:
        yield lambda views: live.update(_table(views, spinner))


def _table(views: list[ChildView], spinner: Spinner) -> Table:
    table = Table.grid(padding=(0, 1), expand=True)
    for width in (1, 7, 6):
        table.add_column(width=width)
    # The log line takes what is left, however long it is.
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis", style="dim")
    for view in views:
        mark = Text("✓", style="green") if view.healthy else spinner
        table.add_row(mark, view.name, f"{view.seconds:4.0f} s", Text("" if view.healthy else view.last_line))
    return table


class _PlainLines:
    """One line when a child becomes healthy, and a sign of life from the others now and then."""

    SILENCE_S = 10.0
    LINE = 120

    def __init__(self, console: Console) -> None:
        self._console = console
        self._announced: set[str] = set()
        self._spoke_after_s = 0.0

    def show(self, views: list[ChildView]) -> None:
        for view in views:
            if view.healthy and view.name not in self._announced:
                self._announced.add(view.name)
                self._say(f"{view.name} is up after {view.seconds:.0f} s", view)
        for view in views:
            if not view.healthy and view.seconds - self._spoke_after_s > self.SILENCE_S:
                self._say(f"{view.name} is starting, {view.seconds:.0f} s: {view.last_line[: self.LINE]}", view)

    def _say(self, line: str, view: ChildView) -> None:
        self._spoke_after_s = max(self._spoke_after_s, view.seconds)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
