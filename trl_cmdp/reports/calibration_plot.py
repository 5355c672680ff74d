"""The plot of a calibration: costs of the student before and after imitation, and satisfaction by limit."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from .._defaults import COST_UNITS
from ..evaluation import Calibration
from ..evaluation.calibration import sampled_costs
from ..evaluation.summary import Evaluation
from ._figures import (
    COLOURS,
    LIMIT_LINE,
    SMALLEST_COST,
    bars,
    cumulative,
    legend_below,
    new_figure,
    number_decades,
    save,
    short,
    style_axes,
)


_BINS = 40
_START, _IMITATION, _RANGE = COLOURS[0], COLOURS[2], COLOURS[3]


def plot_calibration(calibration: Calibration, evaluations: Sequence[Evaluation], path: str | Path) -> Figure:
    """
    Draw the distribution of the costs, and the share of rollouts within each limit: now, and after imitation where
    that was measured. The suggested range is shaded; where there is none, a line shows the student's median.
    """
    scope, settings = calibration.cost_scope, calibration.start.settings
    costs = [
        [max(cost, SMALLEST_COST) for of_problem in sampled_costs(*evaluation)[scope] for cost in of_problem]
        for evaluation in evaluations
    ]
    distributions = [calibration.start, calibration.imitation][: len(costs)]
    styles = zip(("now", "after imitation"), (_START, _IMITATION), costs, distributions, strict=False)
    lowest = min(map(min, costs))
    highest = max(*map(max, costs), 1.01 * lowest)

    figure = new_figure(11, 4.4)
    histogram, satisfaction = figure.subplots(1, 2)
    edges = [lowest * (1.0001 * highest / lowest) ** (index / _BINS) for index in range(_BINS + 1)]
    for label, colour, values, distribution in styles:
        histogram.hist(values, edges, weights=[1 / len(values)] * len(values), color=colour, alpha=0.55, label=label)
        satisfaction.step(*cumulative(values, lowest / 2), where="post", color=colour, linewidth=1.6)
        satisfaction.plot([max(values), 2 * highest], [1, 1], color=colour, linewidth=1.6)
        for limit, share in zip(calibration.limits, distribution.satisfaction, strict=True):
            style = {"fmt": "o", "markersize": 4, "elinewidth": 1.2, "color": colour}
            satisfaction.errorbar(limit, share.value, bars(share), **style)
    unit = COST_UNITS[scope]
    histogram.set(xlabel=f"cost of a rollout, {unit}", ylabel="share of rollouts", title="Costs of rollouts")
    satisfaction.set(xlabel=f"cost_limit, {unit}", ylabel="share within it", title="Satisfaction by limit")
    satisfaction.set_ylim(-0.02, 1.04)
    for axes in (histogram, satisfaction):
        _mark_suggestion(axes, calibration)
        _style_costs(axes, lowest, highest)
    legend_below(figure, histogram, 3)
    figure.get_layout_engine().set(w_pad=0.12)
    students = f"{short(settings.name)} on {short(Path(settings.task).stem)}"
    return save(figure, path, f"{students}, {calibration.start.num_rollouts} rollouts")


def _mark_suggestion(axes: Axes, calibration: Calibration) -> None:
    found = calibration.suggestion
    if found.verdict == "range":
        style = {"color": _RANGE, "alpha": 0.18, "linewidth": 0, "zorder": 0}
        axes.axvspan(found.reached, found.start, label="suggested range", **style)
    elif found.start > SMALLEST_COST:
        axes.axvline(found.start, label="median now", **LIMIT_LINE)


def _style_costs(axes: Axes, lowest: float, highest: float) -> None:
    axes.set_xscale("log")
    margin = max(highest / lowest, 2) ** 0.03
    axes.set_xlim(lowest / margin, highest * margin)
    if highest < 100 * lowest:
        number_decades(axes.xaxis)
    else:
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    style_axes(axes)
