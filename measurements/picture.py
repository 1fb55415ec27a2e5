"""One look for every picture of a result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transfer.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120
# Routes have the same colour in every picture.
COLOURS = {
    "gpu": "tab:blue",
    "cpu": "tab:orange",
    "replicated": "tab:green",
    "split raw": "tab:red",
    "split q8": "tab:purple",
    "auto": "black",
}


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` in the format of ``path``'s name; :class:`ConfigError` where that cannot be."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.title.set_fontsize(10)
        axes.tick_params(labelsize=8)
        if legend := axes.get_legend():
            legend.set_frame_on(False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot draw {path}: {error}") from None
