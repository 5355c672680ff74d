"""What every plot shares: figures without global state, colours, axes, legends, and how names are written."""

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from .._files import write_whole
from .._messages import printable
from ..evaluation.rates import ValueWithInterval


# Apart from one another in hue or lightness; after the last one they start again, with other lines.
COLOURS = (
    *("#1b6ca8", "#d1495b", "#2e7d4f", "#e69f00", "#7b4fa3", "#17b3b3"),
    *("#8c564b", "#e377c2", "#5c5c5c", "#9aa800", "#0b2f5c", "#ff7043"),
)
LINES = ("-", "--", ":")
LIMIT_LINE: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}
SMALLEST_COST = 1e-4  # on a logarithmic axis
_LONGEST_NAME = 32
_MOST_STEPS = 1000  # as fine as a pixel


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, its size in inches, that no global state holds: pyplot would keep some in a library."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | Path, title: str | None = None) -> Figure:
    """Write a figure, under a title of all its axes if there is one, as PNG."""
    write_whole(path, png(figure, title))
    return figure


def png(figure: Figure, title: str | None = None) -> bytes:
    """A figure, under a title of all its axes if there is one, as the bytes of a PNG."""
    if title is not None:
        figure.suptitle(literal(title))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def style_axes(axes: Axes) -> None:
    """A light grid, and no frame at the top and on the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Figure, axes: Axes, num_columns: int, **style: Any) -> None:
    """The legend of some axes, below all axes of their figure: of so many columns, or as many as it is wide enough for."""
    handles, labels = axes.get_legend_handles_labels()
    for columns in range(num_columns, 0, -1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, **style)
        if columns == 1 or legend.get_window_extent(figure.canvas.get_renderer()).width <= figure.bbox.width:
            return
        legend.remove()


def colours_by_name(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, so that a method has the same one in every plot of a comparison."""
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(sorted(names))}


def lines_by_name(names: Sequence[str]) -> dict[str, str]:
    """A line style for each name: another one where colours repeat."""
    return {name: LINES[index // len(COLOURS) % len(LINES)] for index, name in enumerate(sorted(names))}


def literal(text: str) -> str:
    """A text as matplotlib shows it letter by letter: no formula between dollar signs, no control character."""
    return " ".join(printable(text).split("\n")).replace("$", r"\$")


def short(name: str) -> str:
    """A name, or its beginning if it is long."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def plain(name: str) -> str:
    """A short name, letter by letter."""
    return literal(short(name))


def bars(figure: ValueWithInterval) -> list[list[float]]:
    """Lengths of an error bar, as matplotlib takes them."""
    # Rounding may put a percentile of equal values past their mean.
    return [[max(0.0, figure.value - figure.low)], [max(0.0, figure.high - figure.value)]]


def number_decades(axis: Any, wide: bool = False) -> None:
    """Plain numbers, 1, 2 and 5 of each decade or, of many, 1 alone, on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def whole_numbers(axis: Any) -> None:
    """Ticks of an axis at whole numbers alone: there is no half step."""
    axis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def logarithmic_if_wide(axes: Axes, which: Literal["x", "y"], values: Sequence[float]) -> bool:
    """Make an axis logarithmic where positive values span a decade or more. Returns whether it is."""
    wide = bool(values) and min(values) > 0 and max(values) >= 10 * min(values)
    if wide:
        axes.set(**{f"{which}scale": "log"})
        number_decades(axes.xaxis if which == "x" else axes.yaxis, max(values) >= 1000 * min(values))
    return wide


def cumulative(values: Sequence[float], start: float) -> tuple[list[float], list[float]]:
    """Steps of the share of values of at most each, or of a thousand of them: from 0 at `start` to 1."""
    ordered = sorted(values)
    counts = range(len(ordered), 0, -math.ceil(len(ordered) / _MOST_STEPS))[::-1]
    return [start, *(ordered[count - 1] for count in counts)], [0.0, *(count / len(ordered) for count in counts)]
