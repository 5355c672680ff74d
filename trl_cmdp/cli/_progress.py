"""Live line of a training run: reward, cost against its limit, satisfaction."""

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainingProgress(TrainerCallback):
    """
    Progress bar with the latest reward, cost and satisfaction; a plain line now and then where there is no terminal.

    Args:
        cost_limit (`float`):
            Limit shown beside the cost.
    """

    def __init__(self, cost_limit: float):
        self._cost_limit = cost_limit
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
            console=Console(),
            disable=not sys.stdout.isatty(),
        )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._task = self._progress.add_task("training", total=state.max_steps, metrics="")
        self._progress.start()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs: Any):
        if not state.is_world_process_zero or logs.get("reward") is None:
            return
        line = f"reward {logs['reward']:.3f}"
        if "constraint/cost" in logs:
            line += (
                f" · cost {logs['constraint/cost']:.3f}/{self._cost_limit:g}"
                f" · satisfied {logs['constraint/satisfaction_rate']:.3f}"
            )
        self._progress.update(self._task, completed=state.global_step, metrics=line)
        if self._progress.disable and state.global_step % max(1, state.max_steps // 20) == 0:
            print(f"step {state.global_step}/{state.max_steps} · {line}", flush=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._progress.stop()
