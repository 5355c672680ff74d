"""Live line of a training run: reward, cost against its limit, satisfaction."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


_SECONDS_BETWEEN_LINES = 5.0


class TrainingProgress(TrainerCallback):
    """
    Progress bar with the latest reward, cost and satisfaction. Where there is no terminal, a plain line when something
    is logged, but not more often than every few seconds, and for every evaluation.
    """

    def __init__(self):
        self._last_line = float("-inf")
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
        self._progress.update(self._task, completed=state.global_step)  # above 0 in a resumed run
        if state.is_world_process_zero:
            self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs: Any):
        if not state.is_world_process_zero:
            return
        for prefix in ("", "eval_"):
            if logs.get(f"{prefix}reward") is not None:
                self._show(self._describe(logs, prefix), state, is_evaluation=bool(prefix))

    def _describe(self, logs: dict[str, Any], prefix: str) -> str:
        name = "evaluation: reward" if prefix else "reward"
        text = f"{name} {logs[f'{prefix}reward']:.3f}"
        cost, satisfied, limit = (
            logs.get(f"{prefix}constraint/{metric}") for metric in ("cost", "satisfaction_rate", "limit")
        )
        if cost is not None:
            text += f" · cost {cost:.3f}" + (f"/{limit:.4g}" if limit is not None else "")
        if satisfied is not None:
            text += f" · satisfied {satisfied:.3f}"
        return text

    def _show(self, text: str, state: TrainerState, is_evaluation: bool) -> None:
        line = f"step {state.global_step}/{state.max_steps} · {text}"
        if not self._progress.disable:
            if is_evaluation:  # stays above the bar, which shows training
                self._progress.console.print(line, highlight=False)
            else:
                self._progress.update(self._task, metrics=text)
            return
        now = time.monotonic()
        if is_evaluation or state.global_step == state.max_steps or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(line, flush=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.stop()

    def stop(self) -> None:
        """Give the terminal back, also after an error."""
        self._progress.stop()
