"""Plots of a comparison: right answers against cost, and the training curves of all methods."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from ..evaluation import CellRecord, Comparison, MethodSummary


# Apart from one another in hue or lightness; after the last one they start again, with other lines.
_COLOURS = (
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
_LINES = ("-", "--", ":")
_SMOOTHED_STEPS = 5
# Where a label may stand, in points from its point: near places first.
_LABEL_OFFSETS = [
    (sign_x * distance, sign_y * rise * distance)
    for distance in (7, 14, 24, 36, 50, 70)
    for rise in (0.6, 1.6, 0.0)
    for sign_x in (1, -1)
    for sign_y in (1, -1)
]


def plot_pareto(comparison: Comparison, path: str | Path, title: str) -> Figure:
    """
    Draw right answers against mean cost: a labelled point for each method with its 95% intervals, its seeds behind it.
    Methods that satisfy the limit are filled, the others hollow.

    Args:
        comparison (`Comparison`):
            The comparison.
        path (`str` or `Path`):
            PNG file to write.
        title (`str`):
            Title of the figure.

    Returns:
        `Figure`: The figure.
    """
    figure = Figure(figsize=(8.5, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    trained = [row for row in comparison.methods if row.trainer != "none"]
    colours = _colours([row.method for row in trained])
    # The teacher costs nothing, which a logarithmic axis cannot show: it is a line.
    teacher = [row for row in comparison.methods if row.trainer == "none" and row.method == "teacher"]
    points = [row for row in comparison.methods if row not in teacher]
    for row in teacher:
        axes.axhline(row.right.value, color="0.45", linestyle=":", linewidth=1.2, label="teacher")
    axes.axvline(comparison.cost_limit, color="black", linestyle="--", linewidth=1, label="limit")

    for row in points:
        colour = colours.get(row.method, "0.25")
        seeds = row.right.by_seed
        axes.scatter([row.cost.by_seed[seed] for seed in seeds], list(seeds.values()), s=14, color=colour, alpha=0.35)
        axes.errorbar(
            row.cost.value,
            row.right.value,
            xerr=_bars(row.cost.value, row.cost.low, row.cost.high),
            yerr=_bars(row.right.value, row.right.low, row.right.high),
            fmt="X" if row.trainer == "none" else "o",
            markersize=9,
            markeredgewidth=1.8,
            color=colour,
            markerfacecolor=colour if row.feasible else "white",
            elinewidth=1,
            alpha=0.95,
            zorder=3,
            label=_label(row),
        )
    costs = [cost for row in points for cost in (row.cost.low, comparison.cost_limit, row.cost.high)]
    if costs and min(costs) > 0 and max(costs) >= 10 * min(costs):
        axes.set_xscale("log")
        _number_decades(axes.xaxis)
    axes.set(xlabel="mean cost, nats per token", ylabel="share of right final answers")
    _style(axes)
    axes.set_title(title, pad=20)
    axes.margins(0.12, 0.1)
    limit_label = axes.annotate(
        f"limit {comparison.cost_limit:g}",
        (comparison.cost_limit, 1),
        (0, 3),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=9,
    )
    for row in teacher:
        axes.annotate(
            "teacher, cost 0",
            (1, row.right.value),
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
    _place_labels(
        axes, points, colours, comparison.cost_limit, [text for text in axes.texts if text is not limit_label]
    )
    figure.savefig(path, dpi=150)
    return figure


def plot_comparison_curves(records: Sequence[CellRecord], path: str | Path, title: str) -> Figure:
    """
    Draw reward, cost against the limit and satisfaction over the steps: a line for each method, the mean over its
    seeds, smoothed over 5 steps.

    Args:
        records (`Sequence[CellRecord]`):
            The cells. Those without a history are left out.
        path (`str` or `Path`):
            PNG file to write.
        title (`str`):
            Title of the figure.

    Returns:
        `Figure`: The figure.
    """
    histories: dict[str, list[list[dict[str, float]]]] = {}
    for record in records:
        if record.history:
            histories.setdefault(record.method, []).append(record.history)
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    reward, cost, satisfaction = figure.subplots(1, 3)
    panels = {"reward": reward, "cost": cost, "satisfaction": satisfaction}
    colours = _colours(list(histories))
    for key, axes in panels.items():
        lowest, highest = float("inf"), 0.0
        for method, runs in histories.items():
            steps, values = _mean_curve(runs, key)
            # Empty where it is not logged (GRPO has no cost), so that the legend holds every method once.
            line = _LINES[sorted(histories).index(method) // len(_COLOURS) % len(_LINES)]  # where colours repeat
            axes.plot(steps, values, color=colours[method], linestyle=line, linewidth=1.6, label=method)
            lowest, highest = min([lowest, *values]), max([highest, *values])
        if key == "cost" and lowest > 0 and highest >= 10 * lowest:
            axes.set_yscale("log")
            _number_decades(axes.yaxis)
        axes.set_xlabel("optimizer step")
        _style(axes)
    if records:
        cost.axhline(records[0].cost_limit, color="black", linestyle="--", linewidth=1, label="limit")
    reward.set(title="Task reward", ylabel="mean reward of a rollout")
    cost.set(title="Cost against its limit", ylabel="nats per token")
    satisfaction.set(title="Satisfaction", ylabel="share of rollouts within the limit", ylim=(0, 1.02))
    handles, labels = cost.get_legend_handles_labels()
    num_rows = math.ceil(len(labels) / 7)
    num_columns = math.ceil(len(labels) / num_rows) if labels else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=num_columns, frameon=False)
    figure.get_layout_engine().set(w_pad=0.12)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    return figure


def _mean_curve(runs: Sequence[Sequence[dict[str, float]]], key: str) -> tuple[list[float], list[float]]:
    """Steps, and the mean over the runs that logged each, averaged over it and the 4 before."""
    by_step: dict[float, list[float]] = {}
    for history in runs:
        for entry in history:
            if key in entry:
                by_step.setdefault(entry["step"], []).append(entry[key])
    steps = sorted(by_step)
    means = [sum(by_step[step]) / len(by_step[step]) for step in steps]
    windows = [means[max(0, end - _SMOOTHED_STEPS) : end] for end in range(1, len(means) + 1)]
    return steps, [sum(window) / len(window) for window in windows]


def _place_labels(
    axes: Axes, rows: Sequence[MethodSummary], colours: dict[str, str], limit: float, taken: Sequence[Text]
) -> None:
    """Write each method's name beside its point, at the nearest place where it covers neither lines nor names."""
    figure = axes.figure
    figure.draw_without_rendering()  # fixes the layout, which the places are measured in
    pixels_per_point = figure.dpi / 72
    line = axes.transData.transform((limit, 0))[0]
    occupied = [text.get_window_extent() for text in taken]
    occupied.append(Bbox.from_extents(line - 1, axes.bbox.y0, line + 1, axes.bbox.y1))
    for row in rows:
        occupied += _drawn(axes, row, 8 * pixels_per_point)
    for row in rows:
        text = axes.annotate(
            _label(row),
            (row.cost.value, row.right.value),
            _LABEL_OFFSETS[0],
            textcoords="offset points",
            fontsize=9,
            color=colours.get(row.method, "0.25"),
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4},
            path_effects=[withStroke(linewidth=2, foreground="white")],
            zorder=4,
        )
        # A few points further away for a thin line less: crossing another name or point costs far more.
        best = min(
            _LABEL_OFFSETS,
            key=lambda offset: _overlap(_place(text, offset), occupied, axes.bbox) + 2 * math.hypot(*offset),
        )
        occupied.append(_place(text, best))


def _drawn(axes: Axes, row: MethodSummary, radius: float) -> list[Bbox]:
    """Boxes, in pixels, of a method's point, its bars and its seeds."""
    x, y = axes.transData.transform((row.cost.value, row.right.value))
    left, bottom = axes.transData.transform((row.cost.low, row.right.low))
    right, top = axes.transData.transform((row.cost.high, row.right.high))
    boxes = [
        Bbox.from_extents(x - radius, y - radius, x + radius, y + radius),
        Bbox.from_extents(left, y - 1, right, y + 1),
        Bbox.from_extents(x - 1, bottom, x + 1, top),
    ]
    for seed, share in row.right.by_seed.items():
        x, y = axes.transData.transform((row.cost.by_seed[seed], share))
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


def _label(row: MethodSummary) -> str:
    return "untrained student" if row.trainer == "none" and row.method == "student" else row.method


def _colours(methods: Sequence[str]) -> dict[str, str]:
    """By name, so that a method has the same colour in every plot of a comparison."""
    return {method: _COLOURS[place % len(_COLOURS)] for place, method in enumerate(sorted(methods))}


def _bars(value: float, low: float, high: float) -> list[list[float]]:
    # Rounding may put a percentile of equal values past their mean.
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _number_decades(axis: Any) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _style(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
