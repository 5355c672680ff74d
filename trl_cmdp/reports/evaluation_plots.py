"""Plots of evaluations: distribution of the costs, divergence along the completion, strata of difficulty, Pareto."""

import math
from collections.abc import Sequence
from itertools import zip_longest

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .._defaults import COST_UNITS, FEASIBLE_SATISFACTION, CostScope
from ..evaluation.summary import RolloutSummary, rollout_costs
from ._figures import LIMIT_LINE, SMALLEST_COST, bars, cumulative, plain, style_axes, whole_numbers
from .pareto import ParetoPoint, draw_pareto
from .runs import EvaluationRun


# Behind that few rollouts, means and quantiles are those of the longest ones alone.
FEWEST_ROLLOUTS = 20
_MOST_POSITIONS = 1000
_RATES = {"right": "correct answers", "satisfaction": "within the limit"}


def draw_cost_distribution(axes: Axes, runs: Sequence[EvaluationRun], colours: dict[str, str], greedy: bool) -> None:
    """Draw the share of rollouts of at most each cost. Where a line crosses the limit it shows the satisfaction."""
    settings = runs[0].settings
    lowest = settings.cost_limit / 10
    for run in runs:
        rollouts = [record for record in run.records if record.greedy == greedy and record.costs]
        (costs,) = rollout_costs([rollouts], settings.cost_scope)
        costs = [max(SMALLEST_COST, cost) for cost in costs]
        lowest = min(lowest, *costs)
        style = {"where": "post", "color": colours[run.name], "linewidth": 1.6, "label": plain(run.name)}
        axes.step(*cumulative(costs, SMALLEST_COST), **style)
    axes.axvline(settings.cost_limit, label="limit", **LIMIT_LINE)
    axes.set_xscale("log")
    axes.set_xlim(left=lowest)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel=f"cost of a rollout, {COST_UNITS[settings.cost_scope]}", ylabel="share of rollouts", ylim=(0, 1.02)
    )
    style_axes(axes)
    axes.legend(frameon=False, fontsize=8)


def position_profile(run: EvaluationRun, greedy: bool) -> tuple[list[float], list[float], list[float]]:
    """
    Mean, 10% and 90% quantile of the divergence at each position of a completion, as long as 20 rollouts, or all, are
    that long.
    """
    rollouts = [record.costs for record in run.records if record.greedy == greedy and record.costs]
    fewest = min(FEWEST_ROLLOUTS, len(rollouts))
    means, low, high = [], [], []
    for column in zip_longest(*rollouts):
        costs = torch.tensor([cost for cost in column if cost is not None], dtype=torch.float64)
        if len(costs) < fewest:
            break
        means.append(costs.mean().item())
        low.append(costs.quantile(0.1).item())
        high.append(costs.quantile(0.9).item())
    return means, low, high


def draw_position_profile(axes: Axes, profile: tuple[list[float], list[float], list[float]], colour: str) -> None:
    """Draw [`position_profile`]."""
    means, low, high = profile
    indices = range(0, len(means), math.ceil(len(means) / _MOST_POSITIONS) or 1)
    positions = [index + 1 for index in indices]
    means_shown, *band = ([values[index] for index in indices] for values in (means, low, high))
    axes.fill_between(positions, *band, color=colour, alpha=0.22, linewidth=0)
    axes.plot(positions, means_shown, color=colour, linewidth=1.6)
    axes.set(xlabel="token of the completion", ylabel="divergence, nats")
    axes.set_xlim(1, max(2, len(means)))
    whole_numbers(axes.xaxis)
    style_axes(axes)


def draw_strata(axes: Axes, summaries: dict[str, RolloutSummary], colours: dict[str, str], figure: str) -> None:
    """
    Draw a rate by difficulty, `"right"` or, of students with costs, `"satisfaction"`: a mark for each student with its
    95% interval.
    """
    strata = ordered_strata(summaries)
    for index, (name, summary) in enumerate(summaries.items()):
        shift = 0.6 * ((index + 0.5) / len(summaries) - 0.5)
        for column, stratum in enumerate(strata):
            if stratum in summary.strata:
                part = summary.strata[stratum]
                rate = part.right if figure == "right" else part.costs.satisfaction
                style = {"fmt": "o", "markersize": 5, "elinewidth": 1.2, "color": colours[name]}
                label = plain(name) if column == 0 else None
                axes.errorbar(column + shift, rate.value, yerr=bars(rate), label=label, **style)
    axes.set_xticks(range(len(strata)), [plain(stratum) for stratum in strata])
    if max(map(len, strata)) * len(strata) > 40:
        axes.tick_params(axis="x", rotation=20)
    axes.set_xlim(-0.5, len(strata) - 0.5)
    axes.set(ylim=(-0.02, 1.02), ylabel=_RATES[figure])
    style_axes(axes)
    axes.grid(axis="x", visible=False)


def ordered_strata(summaries: dict[str, RolloutSummary]) -> list[str]:
    """Every student's strata, in the order of the summaries."""
    return list(dict.fromkeys(stratum for summary in summaries.values() for stratum in summary.strata))


def draw_evaluation_pareto(
    summaries: dict[str, RolloutSummary],
    teacher: RolloutSummary | None,
    colours: dict[str, str],
    cost_limit: float,
    scope: CostScope,
    size: tuple[float, float],
) -> Figure:
    """Draw correct answers against mean cost: a point for each student with costs, a line for the teacher."""
    points = [
        ParetoPoint(
            name=name,
            cost=summary.costs.mean,
            correct=summary.right,
            feasible=summary.costs.satisfaction.value >= FEASIBLE_SATISFACTION,
        )
        for name, summary in summaries.items()
        if summary.costs is not None
    ]
    label = f"mean cost of a rollout, {COST_UNITS[scope]}"
    teacher_correct = None if teacher is None else teacher.right.value
    return draw_pareto(
        points, cost_limit, cost_label=label, colours=colours, teacher_correct=teacher_correct, size=size
    )
