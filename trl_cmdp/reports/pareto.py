"""Correct answers against mean cost: a labelled point for each student."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from .._defaults import FEASIBLE_SATISFACTION
from ..evaluation.rates import ValueWithInterval
from ._figures import LIMIT_LINE, bars, colours_by_name, literal, logarithmic_if_wide, new_figure, plain, style_axes


# Where a label may stand, in points from its point: near positions first.
_LABEL_OFFSETS = [
    (sign_x * distance, sign_y * rise * distance)
    for distance in (7, 14, 24, 36, 50, 70)
    for rise in (0.6, 1.6, 0.0)
    for sign_x in (1, -1)
    for sign_y in (1, -1)
]


_Box = Sequence[float]  # left, bottom, right and top, in pixels
_MARK = {"markersize": 9, "markeredgewidth": 1.8, "elinewidth": 1, "alpha": 0.95, "zorder": 3}


@dataclass(frozen=True)
class ParetoPoint:
    """Mean cost of one student's rollouts, and its share of correct final answers."""

    name: str
    cost: ValueWithInterval
    correct: ValueWithInterval
    feasible: bool  # its mark is filled, else hollow
    trained: bool = True  # a method, with a colour, or a reference
    seeds: list[tuple[float, float]] = field(default_factory=list)  # cost and correct answers of each
    note: str = ""  # behind its name


def draw_pareto(
    points: Sequence[ParetoPoint],
    cost_limit: float,
    *,
    cost_label: str,
    title: str = "",
    colours: dict[str, str] | None = None,
    teacher_correct: float | None = None,
    size: tuple[float, float] = (8.5, 5.6),
) -> Figure:
    """
    Draw correct answers against mean cost, with 95% intervals and the limit.

    `colours` are those of the trained students, this figure's own if `None`. The teacher costs nothing, which a
    logarithmic axis cannot show: its correct answers are a line.
    """
    figure = new_figure(*size)
    axes = figure.subplots()
    if colours is None:
        colours = colours_by_name([point.name for point in points if point.trained])
    if teacher_correct is not None:
        axes.axhline(teacher_correct, color="0.45", linestyle=":", linewidth=1.2, label="teacher")
    axes.axvline(cost_limit, label="limit", **LIMIT_LINE)

    for point in points:
        colour = colours.get(point.name, "0.25")
        costs, shares = [cost for cost, _ in point.seeds], [share for _, share in point.seeds]
        axes.scatter(costs, shares, s=14, color=colour, alpha=0.35)
        axes.errorbar(
            point.cost.value,
            point.correct.value,
            xerr=bars(point.cost),
            yerr=bars(point.correct),
            fmt="o" if point.trained else "X",
            color=colour,
            markerfacecolor=colour if point.feasible else "white",
            label=plain(point.name) + point.note,
            **_MARK,
        )
    logarithmic_if_wide(axes, "x", [cost for one in points for cost in (one.cost.low, cost_limit, one.cost.high)])
    axes.set(xlabel=cost_label, ylabel="share of correct final answers")
    style_axes(axes)
    axes.set_title(literal(title), pad=20)
    axes.margins(0.12, 0.1)
    above: dict[str, Any] = {"textcoords": "offset points", "va": "bottom", "fontsize": 9}
    at_limit = {"xycoords": axes.get_xaxis_transform(), "ha": "center", **above}
    limit_label = axes.annotate(f"limit {cost_limit:g}", (cost_limit, 1), (0, 3), **at_limit)
    if teacher_correct is not None:
        at_right = {"xycoords": axes.get_yaxis_transform(), "ha": "right", "color": "0.35", **above}
        axes.annotate("teacher, cost 0", (1, teacher_correct), (-4, 3), **at_right)
    mark: dict[str, Any] = {"color": "0.25", "marker": "o", "linestyle": "", "markersize": 8}
    handles = [
        Line2D([], [], label=f"satisfaction at least {FEASIBLE_SATISFACTION:g}", **mark),
        Line2D([], [], label="below", mfc="white", mew=1.8, **mark),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    taken = [text for text in axes.texts if text is not limit_label]
    _place_labels(axes, points, colours, cost_limit, teacher_correct, taken)
    return figure


def _place_labels(
    axes: Axes,
    points: Sequence[ParetoPoint],
    colours: dict[str, str],
    limit: float,
    teacher: float | None,
    taken: Sequence[Text],
) -> None:
    """Write each method's name beside its point, at the nearest position where it covers neither lines nor names."""
    figure = axes.figure
    figure.draw_without_rendering()  # fixes the layout, which the positions are measured in
    pixels_per_point = figure.dpi / 72
    line = axes.transData.transform((limit, 0))[0]
    occupied = [text.get_window_extent().extents for text in taken]
    occupied.append((line - 1, axes.bbox.y0, line + 1, axes.bbox.y1))
    if teacher is not None:
        level = axes.transData.transform((limit, teacher))[1]
        occupied.append((axes.bbox.x0, level - 1, axes.bbox.x1, level + 1))
    for point in points:
        occupied += _drawn(axes, point, 8 * pixels_per_point)
    for point in points:
        text = axes.annotate(
            plain(point.name) + point.note,
            (point.cost.value, point.correct.value),
            _LABEL_OFFSETS[0],
            textcoords="offset points",
            fontsize=9,
            color=colours.get(point.name, "0.25"),
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4},
            zorder=4,
        )
        boxes = _boxes(text)
        # A few points further away for a thin line less: crossing another name or point costs far more.
        best = min(
            _LABEL_OFFSETS,
            key=lambda offset: _overlap(boxes[offset], occupied, axes.bbox.extents) + 2 * math.hypot(*offset),
        )
        occupied.append(_moved(text, best))


def _drawn(axes: Axes, point: ParetoPoint, radius: float) -> list[_Box]:
    """Boxes, in pixels, of a method's point, its bars and its seeds."""
    x, y = axes.transData.transform((point.cost.value, point.correct.value))
    left, bottom = axes.transData.transform((point.cost.low, point.correct.low))
    right, top = axes.transData.transform((point.cost.high, point.correct.high))
    seeds = [(*axes.transData.transform(seed), radius / 4) for seed in point.seeds]
    return [
        (left, y - 1, right, y + 1),
        (x - 1, bottom, x + 1, top),
        *((x - r, y - r, x + r, y + r) for x, y, r in ((x, y, radius), *seeds)),
    ]


def _moved(text: Any, offset: tuple[float, float]) -> _Box:
    text.set_position(offset)
    text.set(ha="left" if offset[0] >= 0 else "right", va="center")
    text.update_positions(text.figure.canvas.get_renderer())
    # Of the words alone: the line to the point may cross what it likes.
    return Text.get_window_extent(text).padded(1).extents


def _boxes(text: Any) -> dict[tuple[float, float], _Box]:
    """Box of a label at each offset, measured at one on each side: from there it is moved alone."""
    pixels = text.figure.dpi / 72
    measured = {side: _moved(text, (side, 0)) for side in (1, -1)}
    boxes = {}
    for x, y in _LABEL_OFFSETS:
        side = 1 if x >= 0 else -1
        x0, y0, x1, y1 = map(float, measured[side])
        dx, dy = (x - side) * pixels, y * pixels
        boxes[x, y] = (x0 + dx, y0 + dy, x1 + dx, y1 + dy)
    return boxes


def _overlap(box: _Box, occupied: Sequence[_Box], inside: _Box) -> float:
    """Area, in square pixels, that a label shares with others or has outside the axes."""
    outside = (box[2] - box[0]) * (box[3] - box[1]) - _shared(box, inside)
    return sum(_shared(box, other) for other in occupied) + (outside if outside > 1e-6 else 0.0)


def _shared(one: _Box, other: _Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0
