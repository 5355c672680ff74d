"""The log of a run that goes on, on disk: what `trl-cmdp report --watch` draws."""

import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..._files import LIVE_STATE


_SECONDS = 5.0  # between two writes
_SHARE = 50  # times that a write took, before the next


class LiveState(TrainerCallback):
    """Writes the trainer's state into the output folder when something is logged, every few seconds, and at the end."""

    def __init__(self):
        self._next = 0.0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.is_world_process_zero and time.monotonic() >= self._next:
            self._write(args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.is_world_process_zero:
            self._write(args, state)

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        start = time.monotonic()
        path = Path(args.output_dir, LIVE_STATE)
        beside = path.with_name(f"{LIVE_STATE}.new")
        path.parent.mkdir(parents=True, exist_ok=True)
        state.save_to_json(str(beside))
        os.replace(beside, path)  # a reader finds it whole
        now = time.monotonic()
        self._next = now + max(_SECONDS, _SHARE * (now - start))
