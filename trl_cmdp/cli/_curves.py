"""Training curves for the model card."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..reports import plot_training_curves
from ..trainers.telemetry.card import CURVES_FILE


class CurvesOnPush(TrainerCallback):
    """Draws the training curves beside the model card, which shows them from then on, before anything is pushed."""

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        logged = any(entry.get("reward") is not None for entry in state.log_history)
        if state.is_world_process_zero and logged:
            plot_training_curves(state.log_history, Path(args.output_dir, CURVES_FILE), Path(args.output_dir).name)
