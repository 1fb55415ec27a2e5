"""Figures next to what they must be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from rich.table import Table


class Verdict(NamedTuple):
    """One figure next to what it must be."""

    figure: str
    value: float
    bound: Literal["at least", "at most"]
    target: float

    @property
    def passed(self) -> bool:
        """Whether it is what it must be."""
        return self.value >= self.target if self.bound == "at least" else self.value <= self.target


def table(found: Iterable[Verdict]) -> Table:
    """Every figure that has a target, and whether it reaches it."""
    shown = Table(title="targets", title_justify="left")
    for column in ("figure", "measured", "target", ""):
        shown.add_column(column, justify="left" if column == "figure" else "right", no_wrap=column != "figure")
    for each in found:
        said = "pass" if each.passed else "miss"
        shown.add_row(each.figure, f"{each.value:.3f}", f"{each.bound} {each.target:g}", said)
    return shown
