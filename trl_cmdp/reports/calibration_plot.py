"""The plot of a calibration: costs of the student before and after imitation, and satisfaction by limit."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ..evaluation import Calibration, EvaluationSettings, RolloutRecord
from ..evaluation.calibration import sampled_costs
from ._figures import COLOURS, bars, new_figure, number_decades, plain, style_axes
from .evaluation_plots import UNITS


_SMALLEST_COST = 1e-4  # on a logarithmic axis
_BINS = 40
_START, _IMITATION, _RANGE = COLOURS[0], COLOURS[2], COLOURS[3]


def plot_calibration(
    calibration: Calibration,
    evaluations: Sequence[tuple[EvaluationSettings, Sequence[RolloutRecord]]],
    path: str | Path,
) -> Figure:
    """
    Draw the distribution of the costs, and the share of rollouts within each limit: now, and after imitation where
    that was measured. The suggested range is shaded; where there is none, a line shows the student's median.

    Args:
        calibration ([`~evaluation.Calibration`]):
            The calibration.
        evaluations (`Sequence[tuple[EvaluationSettings, Sequence[RolloutRecord]]]`):
            What it was computed from: the student, and the student after imitation.
        path (`str` or `Path`):
            PNG file to write.

    Returns:
        `Figure`: The figure.
    """
    scope = calibration.cost_scope
    costs = [
        [max(cost, _SMALLEST_COST) for of_problem in sampled_costs(*evaluation)[scope] for cost in of_problem]
        for evaluation in evaluations
    ]
    distributions = [calibration.start, calibration.imitation][: len(costs)]
    styles = list(zip(("now", "after imitation"), (_START, _IMITATION), costs, distributions, strict=False))
    lowest, highest = min(map(min, costs)), max(map(max, costs))

    figure = new_figure(11, 4.4)
    histogram, satisfaction = figure.subplots(1, 2)
    highest = max(highest, 1.01 * lowest)
    edges = [lowest * (1.0001 * highest / lowest) ** (place / _BINS) for place in range(_BINS + 1)]
    for label, colour, values, distribution in styles:
        histogram.hist(values, edges, weights=[1 / len(values)] * len(values), color=colour, alpha=0.55, label=label)
        ordered = sorted(values)
        shares = [place / len(ordered) for place in range(len(ordered) + 1)]
        satisfaction.step([lowest / 2, *ordered], shares, where="post", color=colour, linewidth=1.6)
        satisfaction.plot([ordered[-1], 2 * highest], [1, 1], color=colour, linewidth=1.6)
        for limit, share in zip(calibration.limits, distribution.satisfaction, strict=True):
            error = bars(share.value, share.low, share.high)
            satisfaction.errorbar(limit, share.value, error, fmt="o", markersize=4, elinewidth=1.2, color=colour)
    histogram.set(xlabel=f"cost of a rollout, {UNITS[scope]}", ylabel="share of rollouts", title="Costs of rollouts")
    satisfaction.set(
        xlabel=f"cost_limit, {UNITS[scope]}",
        ylabel="share within it",
        title="Satisfaction by limit",
        ylim=(-0.02, 1.04),
    )
    for axes in (histogram, satisfaction):
        _mark_suggestion(axes, calibration)
        _style_costs(axes, lowest, highest)
    handles, labels = histogram.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    settings = calibration.start.settings
    figure.suptitle(
        f"{plain(settings.name)} on {plain(Path(settings.task).stem)}, {calibration.start.num_rollouts} rollouts"
    )
    figure.get_layout_engine().set(w_pad=0.12)
    figure.savefig(path, dpi=150)
    return figure


def _mark_suggestion(axes: Axes, calibration: Calibration) -> None:
    suggestion = calibration.suggestion
    if suggestion.verdict == "range":
        axes.axvspan(
            suggestion.reached,
            suggestion.start,
            color=_RANGE,
            alpha=0.18,
            linewidth=0,
            zorder=0,
            label="suggested range",
        )
    elif suggestion.start > _SMALLEST_COST:
        axes.axvline(suggestion.start, color="black", linestyle="--", linewidth=1, label="median now")


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
