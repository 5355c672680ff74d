"""Plots of a comparison: correct answers against cost, and the training curves of all methods."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .._defaults import COST_UNITS
from ..evaluation import CellRecord, Comparison
from ._curves import SMOOTHED_STEPS, trailing_means
from ._figures import (
    LIMIT_LINE,
    colours_by_name,
    legend_below,
    lines_by_name,
    logarithmic_if_wide,
    new_figure,
    plain,
    save,
    style_axes,
    whole_numbers,
)
from .pareto import ParetoPoint, draw_pareto
from .tables import method_label


# Keys of a record's history: title and unit of their panels.
CURVES = {
    "reward": ("Task reward", "mean reward of a rollout"),
    "cost": ("Cost against its limit", COST_UNITS["mean"]),
    "satisfaction": ("Satisfaction", "share of rollouts within the limit"),
}


def plot_pareto(comparison: Comparison, path: str | Path, title: str) -> Figure:
    """
    Draw correct answers against mean cost: a labelled point for each method with its 95% intervals, its seeds behind
    it. Methods that satisfy the limit are filled, the others hollow. A method that has fewer seeds than another says
    how many.
    """
    return save(draw_comparison_pareto(comparison, title=title), path)


def draw_comparison_pareto(
    comparison: Comparison, *, title: str = "", size: tuple[float, float] = (8.5, 5.6)
) -> Figure:
    """The figure of [`plot_pareto`], in any size in inches."""
    teachers = [row for row in comparison.methods if row.trainer == "none" and row.method == "teacher"]
    most = max((len(row.right.by_seed) for row in comparison.methods), default=0)
    points = [
        ParetoPoint(
            name=method_label(row),
            note=_few_seeds(len(row.right.by_seed), most),
            cost=row.cost,
            correct=row.right,
            feasible=row.feasible,
            trained=row.trainer != "none",
            seeds=[(row.cost.by_seed[seed], share) for seed, share in row.right.by_seed.items()],
        )
        for row in comparison.methods
        if row not in teachers
    ]
    teacher_correct = teachers[0].right.value if teachers else None
    label = f"mean cost, {COST_UNITS[comparison.cost_scope]}"
    return draw_pareto(
        points, comparison.cost_limit, cost_label=label, title=title, teacher_correct=teacher_correct, size=size
    )


def plot_comparison_curves(
    records: Sequence[CellRecord], path: str | Path, title: str, reference: str | None = None
) -> Figure:
    """
    Draw reward, cost against the limit and satisfaction over the steps: a line for each method, the mean over its
    seeds and over a twentieth of the steps, at least 5; that of the method that is the reference thick, above the others.
    A method that has fewer seeds than another, and a rougher line, says how many.
    """
    figure = new_figure(13, 4.8)
    panels = dict(zip(CURVES, figure.subplots(1, 3), strict=True))
    for key, axes in panels.items():
        draw_comparison_curve(axes, records, key, reference)
        axes.set_title(CURVES[key][0])
    num_labels = len(panels["cost"].get_legend_handles_labels()[1])
    legend_below(figure, panels["cost"], math.ceil(num_labels / max(1, math.ceil(num_labels / 7))) or 1)
    figure.get_layout_engine().set(w_pad=0.12)
    return save(figure, path, title)


def curve_window(records: Sequence[CellRecord]) -> int:
    """Over how many logged values the curves of a comparison are averaged."""
    return max(SMOOTHED_STEPS, max((len(record.history) for record in records), default=0) // 20)


def draw_comparison_curve(axes: Axes, records: Sequence[CellRecord], key: str, reference: str | None = None) -> None:
    """Draw one of the [`CURVES`] of all methods. Cells without a history are left out."""
    histories: dict[str, list[list[dict[str, float]]]] = {}
    for record in records:
        if record.history:
            histories.setdefault(record.method, []).append(record.history)
    colours, lines = colours_by_name(list(histories)), lines_by_name(list(histories))
    most, window = max(map(len, histories.values()), default=0), curve_window(records)
    drawn: list[float] = []
    for method, runs in histories.items():
        steps, values = _mean_curve(runs, key, window)
        # Empty where it is not logged (GRPO has no cost), so that the legend holds every method once.
        style: dict[str, Any] = {"color": colours[method], "linestyle": lines[method]}
        style |= {"linewidth": 2.8, "zorder": 3} if method == reference else {"linewidth": 1.3}
        axes.plot(steps, values, label=plain(method) + _few_seeds(len(runs), most), **style)
        drawn += values
    if key == "cost":
        logarithmic_if_wide(axes, "y", drawn)
        if records:
            axes.axhline(records[0].cost_limit, label="limit", **LIMIT_LINE)
    if key == "satisfaction":
        axes.set_ylim(0, 1.02)
    unit = COST_UNITS[records[0].cost_scope] if key == "cost" and records else CURVES[key][1]
    axes.set(xlabel="optimizer step", ylabel=unit)
    whole_numbers(axes.xaxis)
    style_axes(axes)


def _few_seeds(num_seeds: int, most: int) -> str:
    """What stands behind the name of a method that has fewer seeds than another."""
    return f" ({num_seeds} of {most} seeds)" if num_seeds < most else ""


def _mean_curve(runs: Sequence[Sequence[dict[str, float]]], key: str, window: int) -> tuple[list[float], list[float]]:
    """Steps, and the mean over the runs that logged each, averaged over it and those before."""
    by_step: dict[float, list[float]] = {}
    for history in runs:
        for entry in history:
            if key in entry:
                by_step.setdefault(entry["step"], []).append(entry[key])
    steps = sorted(by_step)
    return steps, trailing_means([sum(by_step[step]) / len(by_step[step]) for step in steps], window)
