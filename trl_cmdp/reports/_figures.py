"""What every plot shares: figures without global state, colours, and how names are written."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter


# Apart from one another in hue or lightness; after the last one they start again, with other lines.
COLOURS = (
    "#1b6ca8",
    "#d1495b",
    "#2e7d4f",
    "#e69f00",
    "#7b4fa3",
    "#17b3b3",
    "#8c564b",
    "#e377c2",
    "#5c5c5c",
    "#9aa800",
    "#0b2f5c",
    "#ff7043",
)
LINES = ("-", "--", ":")
_LONGEST_NAME = 32


def new_figure(width: float, height: float) -> Figure:
    """
    A figure that no global state holds.

    Args:
        width, height (`float`):
            Size in inches.

    Returns:
        `Figure`: An empty figure.
    """
    # The object-oriented interface: pyplot would keep global state in a library.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes) -> None:
    """A light grid, and no frame at the top and on the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def colours_by_name(names: Sequence[str]) -> dict[str, str]:
    """By name, so that a method has the same colour in every plot of a comparison."""
    return {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(sorted(names))}


def lines_by_name(names: Sequence[str]) -> dict[str, str]:
    """A line style for each name: another one where colours repeat."""
    return {name: LINES[place // len(COLOURS) % len(LINES)] for place, name in enumerate(sorted(names))}


def plain(name: str) -> str:
    """A name as matplotlib shows it letter by letter: no formula between dollar signs, no control character."""
    shown = "".join(letter if letter.isprintable() else "�" for letter in name)
    if len(shown) > _LONGEST_NAME:
        shown = f"{shown[: _LONGEST_NAME - 1]}…"
    return shown.replace("$", r"\$")


def bars(value: float, low: float, high: float) -> list[list[float]]:
    """Lengths of an error bar, as matplotlib takes them."""
    # Rounding may put a percentile of equal values past their mean.
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def number_decades(axis: Any) -> None:
    """Plain numbers, 1, 2 and 5 of each decade, on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
