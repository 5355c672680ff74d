"""Plots of a comparison: right answers against cost, and the training curves of all methods."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation import CellRecord, Comparison, Estimate, MethodSummary
from ._curves import trailing_means
from ._figures import colours_by_name, lines_by_name, new_figure, number_decades, plain, style_axes
from .pareto import ParetoPoint, draw_pareto


# Keys of a record's history: title and unit of their panels.
CURVES = {
    "reward": ("Task reward", "mean reward of a rollout"),
    "cost": ("Cost against its limit", "nats per token"),
    "satisfaction": ("Satisfaction", "share of rollouts within the limit"),
}


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
    figure = draw_comparison_pareto(comparison, title=title)
    figure.savefig(path, dpi=150)
    return figure


def draw_comparison_pareto(
    comparison: Comparison, *, title: str = "", width: float = 8.5, height: float = 5.6
) -> Figure:
    """The figure of [`plot_pareto`], in any size in inches."""
    teacher = [row for row in comparison.methods if row.trainer == "none" and row.method == "teacher"]
    return draw_pareto(
        [_point(row) for row in comparison.methods if row not in teacher],
        comparison.cost_limit,
        cost_label="mean cost, nats per token",
        title=title,
        teacher_right=teacher[0].right.value if teacher else None,
        width=width,
        height=height,
    )


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
    figure = new_figure(13, 4.8)
    panels = dict(zip(CURVES, figure.subplots(1, 3), strict=True))
    for key, axes in panels.items():
        draw_comparison_curve(axes, records, key)
        axes.set_title(CURVES[key][0])
    handles, labels = panels["cost"].get_legend_handles_labels()
    num_rows = math.ceil(len(labels) / 7)
    num_columns = math.ceil(len(labels) / num_rows) if labels else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=num_columns, frameon=False)
    figure.get_layout_engine().set(w_pad=0.12)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    return figure


def draw_comparison_curve(axes: Axes, records: Sequence[CellRecord], key: str) -> None:
    """
    Draw one of the [`CURVES`] of all methods.

    Args:
        axes (`Axes`):
            Where.
        records (`Sequence[CellRecord]`):
            The cells. Those without a history are left out.
        key (`str`):
            Key of [`CURVES`].
    """
    histories: dict[str, list[list[dict[str, float]]]] = {}
    for record in records:
        if record.history:
            histories.setdefault(record.method, []).append(record.history)
    colours, lines = colours_by_name(list(histories)), lines_by_name(list(histories))
    lowest, highest = float("inf"), 0.0
    for method, runs in histories.items():
        steps, values = _mean_curve(runs, key)
        # Empty where it is not logged (GRPO has no cost), so that the legend holds every method once.
        style = {"color": colours[method], "linestyle": lines[method]}
        axes.plot(steps, values, linewidth=1.6, label=plain(method), **style)
        lowest, highest = min([lowest, *values]), max([highest, *values])
    if key == "cost" and lowest > 0 and highest >= 10 * lowest:
        axes.set_yscale("log")
        number_decades(axes.yaxis)
    if key == "cost" and records:
        axes.axhline(records[0].cost_limit, color="black", linestyle="--", linewidth=1, label="limit")
    if key == "satisfaction":
        axes.set_ylim(0, 1.02)
    axes.set(xlabel="optimizer step", ylabel=CURVES[key][1])
    style_axes(axes)


def method_label(row: MethodSummary) -> str:
    """Name of a method in tables and plots."""
    return "untrained student" if row.trainer == "none" and row.method == "student" else row.method


def _point(row: MethodSummary) -> ParetoPoint:
    def bounds(estimate: Estimate) -> tuple[float, float, float]:
        return estimate.value, estimate.low, estimate.high

    return ParetoPoint(
        name=method_label(row),
        cost=bounds(row.cost),
        right=bounds(row.right),
        feasible=row.feasible,
        trained=row.trainer != "none",
        seeds=[(row.cost.by_seed[seed], share) for seed, share in row.right.by_seed.items()],
    )


def _mean_curve(runs: Sequence[Sequence[dict[str, float]]], key: str) -> tuple[list[float], list[float]]:
    """Steps, and the mean over the runs that logged each, averaged over it and the 4 before."""
    by_step: dict[float, list[float]] = {}
    for history in runs:
        for entry in history:
            if key in entry:
                by_step.setdefault(entry["step"], []).append(entry[key])
    steps = sorted(by_step)
    return steps, trailing_means([sum(by_step[step]) / len(by_step[step]) for step in steps])
