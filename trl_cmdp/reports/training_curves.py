"""Training curves from the log history that a trainer's state keeps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ._curves import SMOOTHED_STEPS, logged, rate_band, trailing_means
from ._figures import (
    LIMIT_LINE,
    colours_by_name,
    logarithmic_if_wide,
    new_figure,
    plain,
    save,
    style_axes,
    whole_numbers,
)
from .runs import TrainingRun


BAND_STEPS = 10
_COST, _LARGEST_COST = "constraint/cost", "constraint/cost_max"
_LIMIT, _SCHEDULED_LIMIT = "constraint/limit", "constraint/scheduled_limit"
_SATISFACTION, _MULTIPLIER = "constraint/satisfaction_rate", "lagrange_multiplier"


@dataclass(frozen=True)
class TrainingPanel:
    """One panel of the training curves."""

    name: str  # of its file
    title: str
    metric: str  # logged; without it there is nothing to draw
    draw: Callable[[Axes, Sequence[TrainingRun], dict[str, str]], None]  # given the runs' colours by name
    caption: Callable[[Sequence[TrainingRun]], str]

    def is_logged(self, runs: Sequence[TrainingRun]) -> bool:
        """Whether a run has something to draw."""
        return _any_logged(runs, self.metric)


def plot_training_curves(log_history: Sequence[dict[str, Any]], path: str | Path, title: str) -> None:
    """
    Draw reward and, for a run with a teacher, cost against its limit, satisfaction and multiplier over the optimizer
    steps.
    """
    runs = [TrainingRun("this run", "", list(log_history), None, 0)]
    if not TRAINING_PANELS[0].is_logged(runs):
        raise ValueError("The log history has no `reward`: train for at least one logging step (`logging_steps`).")
    panels = [panel for panel in TRAINING_PANELS if panel.is_logged(runs)]
    figure = new_figure(max(5.0, 11 / 3 * len(panels)), 3.4)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel.draw(axes, runs, colours_by_name([run.name for run in runs]))
        axes.set_title(panel.title)
    save(figure, path, title)


def _draw_reward(axes: Axes, runs: Sequence[TrainingRun], colours: dict[str, str]) -> None:
    _draw_metric(axes, runs, colours, "reward")
    _finish(axes, "mean reward of a rollout", runs)


def _draw_cost(axes: Axes, runs: Sequence[TrainingRun], colours: dict[str, str]) -> None:
    _draw_metric(axes, runs, colours, _COST)
    drawn: list[float] = []
    for run in runs:
        steps, largest = logged(run.history, _LARGEST_COST)
        axes.plot(steps, largest, color=colours[run.name], linewidth=0.8, linestyle=":", alpha=0.8)
        drawn += [*largest, *logged(run.history, _COST)[1]]
        for metric in (_LIMIT, _SCHEDULED_LIMIT):  # the one that is meant, and a schedule on its way to it
            steps, limit = logged(run.history, metric)
            axes.plot(steps, limit, **LIMIT_LINE)
            drawn += limit
    if not logarithmic_if_wide(axes, "y", drawn):
        axes.set_ylim(0, None)
    if _any_logged(runs, _LARGEST_COST):
        axes.plot([], [], color="0.4", linewidth=0.8, linestyle=":", label="largest of a rollout")
    if _any_logged(runs, _LIMIT):
        axes.plot([], [], label="limit", **LIMIT_LINE)
    _finish(axes, "nats", runs, legend=True)


def _draw_satisfaction(axes: Axes, runs: Sequence[TrainingRun], colours: dict[str, str]) -> None:
    banded = [run for run in runs if _has_band(run)]
    for run in banded:
        steps, rates = logged(run.history, _SATISFACTION)
        indices, low, high = rate_band(rates, run.batch_size or 1, BAND_STEPS)
        if len(runs) == 1:
            band = {"color": colours[run.name], "alpha": 0.18, "linewidth": 0}
            axes.fill_between([steps[index] for index in indices], low, high, **band)
        else:  # bands of several runs hide one another: the last interval of each, beside one another
            x = steps[-1] * (1 + 0.02 * (1 + banded.index(run)))
            axes.plot([x, x], [low[-1], high[-1]], color=colours[run.name], linewidth=2, solid_capstyle="butt")
    _draw_metric(axes, runs, colours, _SATISFACTION, BAND_STEPS)
    axes.set_ylim(0, 1.02)
    _finish(axes, "share of rollouts within the limit", runs)


def _has_band(run: TrainingRun) -> bool:
    """Whether the intervals of a run's satisfaction can be told."""
    rates = logged(run.history, _SATISFACTION)[1]
    return run.batch_size is not None and bool(rates) and 0 <= min(rates) <= max(rates) <= 1


def _draw_multiplier(axes: Axes, runs: Sequence[TrainingRun], colours: dict[str, str]) -> None:
    _draw_metric(axes, runs, colours, _MULTIPLIER, window=1)
    axes.set_ylim(0, None)
    _finish(axes, "λ", runs)


def _draw_metric(
    axes: Axes, runs: Sequence[TrainingRun], colours: dict[str, str], metric: str, window: int = SMOOTHED_STEPS
) -> None:
    """
    Trailing means of the logged values, of a run alone those values faintly behind them, and the values of evaluations
    during training.
    """
    for run in runs:
        steps, values = logged(run.history, metric)
        if not values:
            continue
        if window > 1 and len(runs) == 1:
            axes.plot(steps, values, color=colours[run.name], linewidth=0.8, alpha=0.3)
        axes.plot(steps, trailing_means(values, window), color=colours[run.name], linewidth=1.6, label=plain(run.name))
        axes.plot(*logged(run.history, f"eval_{metric}"), "D", markersize=4, color=colours[run.name])


def _finish(axes: Axes, unit: str, runs: Sequence[TrainingRun], legend: bool = False) -> None:
    axes.set(xlabel="optimizer step", ylabel=unit)
    whole_numbers(axes.xaxis)
    style_axes(axes)
    if legend or len(runs) > 1:
        axes.legend(frameon=False, fontsize=8)


def _reward_caption(runs: Sequence[TrainingRun]) -> str:
    behind = "Logged values, and their means" if len(runs) == 1 else "Means"
    return f"Mean task reward of a rollout. {behind} over {SMOOTHED_STEPS} logged values.{_evaluated(runs, 'reward')}"


def _cost_caption(runs: Sequence[TrainingRun]) -> str:
    parts = [f"Mean cost of a rollout, over {SMOOTHED_STEPS} logged values"]
    parts += ["the largest of a step dotted"] * _any_logged(runs, _LARGEST_COST)
    parts += ["the limit dashed"] * _any_logged(runs, _LIMIT)
    parts += ["with the schedule that comes to it"] * _any_logged(runs, _SCHEDULED_LIMIT)
    return f"{', '.join(parts)}.{_evaluated(runs, _COST)}"


def _satisfaction_caption(runs: Sequence[TrainingRun]) -> str:
    text = f"Share of training rollouts within the limit, over {BAND_STEPS} logged values."
    if any(map(_has_band, runs)):
        where = "Shaded" if len(runs) == 1 else "Bars at the end"
        text += (
            f" {where}: 95% intervals in which logged values are clusters. Each counts as one micro-batch of one "
            "device, the fewest rollouts that it can be of."
        )
    return text + _evaluated(runs, _SATISFACTION)


def _multiplier_caption(runs: Sequence[TrainingRun]) -> str:
    return f"Price of the cost in the Lagrangian.{_evaluated(runs, _MULTIPLIER)}"


def _evaluated(runs: Sequence[TrainingRun], metric: str) -> str:
    return " Diamonds: evaluations during training." if _any_logged(runs, f"eval_{metric}") else ""


def _any_logged(runs: Sequence[TrainingRun], metric: str) -> bool:
    return any(logged(run.history, metric)[0] for run in runs)


TRAINING_PANELS = (
    TrainingPanel("reward", "Task reward", "reward", _draw_reward, _reward_caption),
    TrainingPanel("cost", "Cost against its limit", _COST, _draw_cost, _cost_caption),
    TrainingPanel("satisfaction", "Satisfaction", _SATISFACTION, _draw_satisfaction, _satisfaction_caption),
    TrainingPanel("multiplier", "Multiplier", _MULTIPLIER, _draw_multiplier, _multiplier_caption),
)
