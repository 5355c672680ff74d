"""Training curves from the log history that a trainer's state keeps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


_REWARD, _COST, _SATISFACTION = "#1b6ca8", "#b3541e", "#2e7d4f"


def plot_training_curves(log_history: Sequence[dict[str, Any]], path: str | Path, title: str) -> None:
    """
    Draw reward and, where a teacher was there, cost against its limit and satisfaction over the optimizer steps.

    Args:
        log_history (`Sequence[dict[str, Any]]`):
            `trainer.state.log_history`, or the `log_history` of a saved `trainer_state.json`.
        path (`str` or `Path`):
            PNG file to write.
        title (`str`):
            Title of the figure.
    """
    entries = [entry for entry in log_history if entry.get("reward") is not None]
    if not entries:
        raise ValueError("The log history has no `reward`: train for at least one logging step (`logging_steps`).")
    steps = [entry["step"] for entry in entries]
    constrained = entries[0].get("constraint/cost") is not None
    # The object-oriented interface: pyplot would keep global state in a library.
    figure = Figure(figsize=(11 if constrained else 5, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3 if constrained else 1, squeeze=False)[0]

    panels[0].plot(steps, [entry["reward"] for entry in entries], color=_REWARD)
    panels[0].set(title="Task reward", ylabel="mean reward of a rollout")
    if constrained:
        panels[1].plot(steps, [entry["constraint/cost"] for entry in entries], color=_COST, label="mean of a rollout")
        limit = [entry["constraint/limit"] for entry in entries]
        panels[1].plot(steps, limit, color="black", linestyle="--", linewidth=1, label="limit")
        panels[1].set(title="Cost against its limit", ylabel="nats", ylim=(0, None))
        panels[1].legend(frameon=False)

        panels[2].plot(steps, [entry["constraint/satisfaction_rate"] for entry in entries], color=_SATISFACTION)
        panels[2].set(title="Satisfaction", ylabel="share of rollouts within the limit", ylim=(0, 1.02))

    for axes in panels:
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
