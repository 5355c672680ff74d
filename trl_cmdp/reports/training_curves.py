"""Training curves from the log history that a trainer's state keeps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ._curves import SMOOTHED_STEPS, logged, rate_band, trailing_means
from ._figures import LIMIT_LINE, colours_by_name, logarithmic_if_wide, new_figure, plain, save, style_axes
from .runs import TrainingRun


BAND_STEPS = 10


@dataclass(frozen=True)
class TrainingPanel:
    """One panel of the training curves."""

    name: str  # of its file
    title: str
    metric: str  # logged; without it there is nothing to draw
    draw: Callable[[Axes, Sequence[TrainingRun], dict[str, str]], None]  # given the runs' colours by name
    caption: str

    def is_logged(self, runs: Sequence[TrainingRun]) -> bool:
        """Whether a run has something to draw."""
        return any(logged(run.history, self.metric)[0] for run in runs)


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
    _draw_metric(axes, runs, colours, "constraint/cost")
    drawn: list[float] = []
    for run in runs:
        steps, largest = logged(run.history, "constraint/cost_max")
        axes.plot(steps, largest, color=colours[run.name], linewidth=0.8, linestyle=":", alpha=0.8)
        drawn += [*largest, *logged(run.history, "constraint/cost")[1]]
        # A schedule or an automatic limit moves it.
        steps, limit = logged(run.history, "constraint/limit")
        axes.plot(steps, limit, **LIMIT_LINE)
        drawn += limit
    if not logarithmic_if_wide(axes, "y", drawn):
        axes.set_ylim(0, None)
    axes.plot([], [], color="0.4", linewidth=0.8, linestyle=":", label="largest of a rollout")
    axes.plot([], [], label="limit", **LIMIT_LINE)
    _finish(axes, "nats", runs, legend=True)


def _draw_satisfaction(axes: Axes, runs: Sequence[TrainingRun], colours: dict[str, str]) -> None:
    for run in runs:
        steps, rates = logged(run.history, "constraint/satisfaction_rate")
        if run.batch_size is not None and rates and 0 <= min(rates) <= max(rates) <= 1:
            indices, *bounds = rate_band(rates, run.batch_size, BAND_STEPS)
            band = {"color": colours[run.name], "alpha": 0.18, "linewidth": 0}
            axes.fill_between([steps[index] for index in indices], *bounds, **band)
    _draw_metric(axes, runs, colours, "constraint/satisfaction_rate", BAND_STEPS)
    axes.set_ylim(0, 1.02)
    _finish(axes, "share of rollouts within the limit", runs)


def _draw_multiplier(axes: Axes, runs: Sequence[TrainingRun], colours: dict[str, str]) -> None:
    _draw_metric(axes, runs, colours, "lagrange_multiplier", window=1)
    axes.set_ylim(0, None)
    _finish(axes, "λ", runs)


def _draw_metric(
    axes: Axes, runs: Sequence[TrainingRun], colours: dict[str, str], metric: str, window: int = SMOOTHED_STEPS
) -> None:
    """The logged values faintly, their trailing means over them, and the values of evaluations during training."""
    for run in runs:
        steps, values = logged(run.history, metric)
        if not values:
            continue
        if window > 1:
            axes.plot(steps, values, color=colours[run.name], linewidth=0.8, alpha=0.3)
        axes.plot(steps, trailing_means(values, window), color=colours[run.name], linewidth=1.6, label=plain(run.name))
        axes.plot(*logged(run.history, f"eval_{metric}"), "D", markersize=4, color=colours[run.name])


def _finish(axes: Axes, unit: str, runs: Sequence[TrainingRun], legend: bool = False) -> None:
    axes.set(xlabel="optimizer step", ylabel=unit)
    style_axes(axes)
    if legend or len(runs) > 1:
        axes.legend(frameon=False, fontsize=8)


TRAINING_PANELS = (
    TrainingPanel(
        "reward",
        "Task reward",
        "reward",
        _draw_reward,
        f"Mean task reward of a rollout: logged values, and their means over {SMOOTHED_STEPS} logged values.",
    ),
    TrainingPanel(
        "cost",
        "Cost against its limit",
        "constraint/cost",
        _draw_cost,
        f"Mean cost of a rollout (over {SMOOTHED_STEPS} logged values), the largest of a step dotted, the limit dashed.",
    ),
    TrainingPanel(
        "satisfaction",
        "Satisfaction",
        "constraint/satisfaction_rate",
        _draw_satisfaction,
        f"Share of training rollouts within the limit over {BAND_STEPS} logged values, with a 95% interval in which "
        "these are clusters. Each counts as one micro-batch of one device, the fewest rollouts that it can be of.",
    ),
    TrainingPanel(
        "multiplier", "Multiplier", "lagrange_multiplier", _draw_multiplier, "Price of the cost in the Lagrangian."
    ),
)
