"""Right answers against mean cost: a labelled point for each student."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from ._figures import bars, colours_by_name, new_figure, number_decades, plain, style_axes


# Where a label may stand, in points from its point: near places first.
_LABEL_OFFSETS = [
    (sign_x * distance, sign_y * rise * distance)
    for distance in (7, 14, 24, 36, 50, 70)
    for rise in (0.6, 1.6, 0.0)
    for sign_x in (1, -1)
    for sign_y in (1, -1)
]


@dataclass(frozen=True)
class ParetoPoint:
    """
    One student.

    Args:
        name (`str`):
            Its name.
        cost (`tuple[float, float, float]`):
            Mean cost of a rollout with its 95% interval: value, lower and upper bound.
        right (`tuple[float, float, float]`):
            Share of right final answers, likewise.
        feasible (`bool`):
            Whether it satisfies the limit: its mark is filled, else hollow.
        trained (`bool`, *optional*, defaults to `True`):
            Whether it is a method, with a colour, or a reference.
        seeds (`list[tuple[float, float]]`, *optional*):
            Cost and right answers of each seed.
    """

    name: str
    cost: tuple[float, float, float]
    right: tuple[float, float, float]
    feasible: bool
    trained: bool = True
    seeds: list[tuple[float, float]] = field(default_factory=list)


def draw_pareto(
    points: Sequence[ParetoPoint],
    cost_limit: float,
    *,
    cost_label: str,
    title: str = "",
    colours: dict[str, str] | None = None,
    teacher_right: float | None = None,
    width: float = 8.5,
    height: float = 5.6,
) -> Figure:
    """
    Draw right answers against mean cost, with 95% intervals and the limit.

    Args:
        points (`Sequence[ParetoPoint]`):
            The students.
        cost_limit (`float`):
            Limit, in the unit of the costs.
        cost_label (`str`):
            What the costs are, with their unit.
        title (`str`, *optional*):
            Title of the figure.
        colours (`dict[str, str]`, *optional*):
            Colour of each trained student, its own in this figure if `None`.
        teacher_right (`float`, *optional*):
            Right answers of the teacher. It costs nothing, which a logarithmic axis cannot show: it is a line.
        width, height (`float`, *optional*):
            Size in inches.

    Returns:
        `Figure`: The figure.
    """
    figure = new_figure(width, height)
    axes = figure.subplots()
    if colours is None:
        colours = colours_by_name([point.name for point in points if point.trained])
    if teacher_right is not None:
        axes.axhline(teacher_right, color="0.45", linestyle=":", linewidth=1.2, label="teacher")
    axes.axvline(cost_limit, color="black", linestyle="--", linewidth=1, label="limit")

    for point in points:
        colour = colours.get(point.name, "0.25")
        axes.scatter(
            [cost for cost, _ in point.seeds], [right for _, right in point.seeds], s=14, color=colour, alpha=0.35
        )
        axes.errorbar(
            point.cost[0],
            point.right[0],
            xerr=bars(*point.cost),
            yerr=bars(*point.right),
            fmt="o" if point.trained else "X",
            markersize=9,
            markeredgewidth=1.8,
            color=colour,
            markerfacecolor=colour if point.feasible else "white",
            elinewidth=1,
            alpha=0.95,
            zorder=3,
            label=plain(point.name),
        )
    costs = [cost for point in points for cost in (point.cost[1], cost_limit, point.cost[2])]
    if costs and min(costs) > 0 and max(costs) >= 10 * min(costs):
        axes.set_xscale("log")
        number_decades(axes.xaxis)
    axes.set(xlabel=cost_label, ylabel="share of right final answers")
    style_axes(axes)
    axes.set_title(title, pad=20)
    axes.margins(0.12, 0.1)
    limit_label = axes.annotate(
        f"limit {cost_limit:g}",
        (cost_limit, 1),
        (0, 3),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=9,
    )
    if teacher_right is not None:
        axes.annotate(
            "teacher, cost 0",
            (1, teacher_right),
            (-4, 3),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=9,
            color="0.35",
        )
    handles = [
        Line2D([], [], color="0.25", marker="o", linestyle="", markersize=8, label="satisfaction at least 0.95"),
        Line2D([], [], color="0.25", marker="o", linestyle="", markersize=8, mfc="white", mew=1.8, label="below"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _place_labels(axes, points, colours, cost_limit, [text for text in axes.texts if text is not limit_label])
    return figure


def _place_labels(
    axes: Axes, points: Sequence[ParetoPoint], colours: dict[str, str], limit: float, taken: Sequence[Text]
) -> None:
    """Write each method's name beside its point, at the nearest place where it covers neither lines nor names."""
    figure = axes.figure
    figure.draw_without_rendering()  # fixes the layout, which the places are measured in
    pixels_per_point = figure.dpi / 72
    line = axes.transData.transform((limit, 0))[0]
    occupied = [text.get_window_extent() for text in taken]
    occupied.append(Bbox.from_extents(line - 1, axes.bbox.y0, line + 1, axes.bbox.y1))
    for point in points:
        occupied += _drawn(axes, point, 8 * pixels_per_point)
    for point in points:
        text = axes.annotate(
            plain(point.name),
            (point.cost[0], point.right[0]),
            _LABEL_OFFSETS[0],
            textcoords="offset points",
            fontsize=9,
            color=colours.get(point.name, "0.25"),
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4},
            zorder=4,
        )
        # A few points further away for a thin line less: crossing another name or point costs far more.
        best = min(
            _LABEL_OFFSETS,
            key=lambda offset: _overlap(_place(text, offset), occupied, axes.bbox) + 2 * math.hypot(*offset),
        )
        occupied.append(_place(text, best))


def _drawn(axes: Axes, point: ParetoPoint, radius: float) -> list[Bbox]:
    """Boxes, in pixels, of a method's point, its bars and its seeds."""
    x, y = axes.transData.transform((point.cost[0], point.right[0]))
    left, bottom = axes.transData.transform((point.cost[1], point.right[1]))
    right, top = axes.transData.transform((point.cost[2], point.right[2]))
    boxes = [
        Bbox.from_extents(x - radius, y - radius, x + radius, y + radius),
        Bbox.from_extents(left, y - 1, right, y + 1),
        Bbox.from_extents(x - 1, bottom, x + 1, top),
    ]
    for seed in point.seeds:
        x, y = axes.transData.transform(seed)
        boxes.append(Bbox.from_extents(x - radius / 4, y - radius / 4, x + radius / 4, y + radius / 4))
    return boxes


def _place(text: Any, offset: tuple[float, float]) -> Bbox:
    text.set_position(offset)
    text.set(ha="left" if offset[0] >= 0 else "right", va="center")
    text.update_positions(text.figure.canvas.get_renderer())
    # Of the words alone: the line to the point may cross what it likes.
    return Text.get_window_extent(text).padded(1)


def _overlap(box: Bbox, occupied: Sequence[Bbox], inside: Bbox) -> float:
    """Area, in square pixels, that a label shares with others or has outside the axes."""
    shared = [Bbox.intersection(box, other) for other in occupied]
    kept = Bbox.intersection(box, inside)
    outside = box.width * box.height - (kept.width * kept.height if kept is not None else 0.0)
    return sum(area.width * area.height for area in shared if area is not None) + (outside if outside > 1e-6 else 0.0)
