"""
A `GRPOTrainer` whose interrupted runs end as if they had never stopped. Every touch of TRL's and transformers' state
between steps is in this file; tests/trainers/test_trl_hooks.py pins them.
"""

import json
import logging
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...teachers import keep_differentiable
from .checkpoints import (
    METHOD_STATE_FILE,
    PROGRESS_FILE,
    ROLLOUTS_FILE,
    check_whole,
    file_sizes,
    last_whole_checkpoint,
    load_tree,
    save_tree,
    start_checkpoint,
)
from .finite_gradients import FiniteGRPOTrainer
from .gradient_check import GradientCheck
from .guards import CheckpointOnSigterm, named_failure, sole_run


_logger = logging.getLogger(__name__)


class ResumableGRPOTrainer(FiniteGRPOTrainer):
    """
    [`~trl.GRPOTrainer`] that resumes exactly, from any checkpoint. The only change is what a checkpoint holds: also the
    rollouts that the generation cycle still needs, the logging window, and the state of the method. SIGTERM ends a run
    with a checkpoint, and two runs cannot train into one folder.

    Takes the arguments of [`~trl.GRPOTrainer`].
    """

    _train_sampler: Sampler | None = None  # of the dataset, unless it is iterable

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        keep_differentiable(self.model)
        self.add_callback(GradientCheck(self.accelerator))
        self._sigterm = CheckpointOnSigterm(self.accelerator)
        self.add_callback(self._sigterm)

    # ------------------------------------------------------------------------------------------------ for subclasses

    def _saved_state(self) -> dict[str, Any]:
        """What a resumed run must find again, of what JSON has."""
        return {}

    def _load_saved_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def _logging_window(self) -> dict[str, Any]:
        """What has been counted in training since the last log."""
        return {"metrics": {name: list(map(float, values)) for name, values in self._metrics["train"].items()}}

    def _load_logging_window(self, window: dict[str, Any]) -> None:
        self._metrics["train"].update(window["metrics"])

    # -------------------------------------------------------------------------------------------------------- training

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        [`~transformers.Trainer.train`], where a resumed run continues as if it had never stopped. SIGTERM
        ends the step under way, saves a checkpoint, and then ends the process.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Folder of a checkpoint, or `True` for the newest one in `args.output_dir` that is whole.

        Raises:
            ValueError: If that checkpoint was cut off while it was written, or there is none that is whole.
            RuntimeError: If another run is training into `args.output_dir`.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint:
            check_whole(resume_from_checkpoint)
        with sole_run(self.args.output_dir, self.accelerator), self._sigterm.listening():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    # --------------------------------------------------------------------------------------------------------- writing

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self._check_weights(folder)
        with named_failure(folder):
            if self.args.should_save:
                start_checkpoint(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self._save_progress(Path(output_dir))  # now, as transformers may delete the checkpoint before this one next

    def _save_progress(self, folder: Path) -> None:
        """Write what transformers and TRL do not: the last files but for the trainer's state."""
        if self._micro_steps_left():
            save_tree(folder / ROLLOUTS_FILE.format(process=self.accelerator.process_index), self._rollouts_left())
        state = self._saved_state()
        if state and self.args.should_save:
            (folder / METHOD_STATE_FILE).write_text(json.dumps(state))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            progress = {
                "step": self._step,
                "batches": self._batches(),
                "logging_window": self._logging_window(),
                "entropy": [self.entropy_coef, self._last_world_entropy],
                "nonfinite_in_a_row": self._nonfinite_in_a_row,
                "files": file_sizes(folder),
            }
            (folder / PROGRESS_FILE).write_text(json.dumps(progress))

    # --------------------------------------------------------------------------------------------------------- resuming

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_progress(Path(checkpoint))

    def _load_progress(self, checkpoint: Path) -> None:
        """Continue where [`_save_progress`] was. Rollouts of a cycle that this run would split otherwise are dropped."""
        if self._saved_state():
            path = checkpoint / METHOD_STATE_FILE
            if not path.exists():
                raise ValueError(
                    f"{checkpoint} has no {METHOD_STATE_FILE}, so it was not written by {type(self).__name__}: "
                    "resuming would start the method's own state anew. Load its weights as `model` instead."
                )
            self._load_saved_state(json.loads(path.read_text()))

        if self._train_sampler is not None:  # TRL's draws an order per epoch from its own random state
            for _ in range(int(self.state.epoch)):
                next(iter(self._train_sampler))
        # Where the data are, so that generation cycles begin where the sampler's do even if this one begins anew.
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        self._buffered_inputs = None
        if not (checkpoint / PROGRESS_FILE).exists():
            _logger.warning(
                f"{checkpoint} has no {PROGRESS_FILE}, so another trainer wrote it. If that was in the middle of a "
                "generation cycle, its rollouts are lost and the rest of the cycle is generated anew."
            )
            return

        progress = json.loads((checkpoint / PROGRESS_FILE).read_text())
        if self.use_adaptive_entropy:  # TRL writes it after older checkpoints are deleted
            self.entropy_coef, self._last_world_entropy = progress["entropy"]
        self._nonfinite_in_a_row = progress.get("nonfinite_in_a_row", 0)  # absent from older checkpoints
        self._load_logging_window(progress["logging_window"])

        saved, batches = progress["batches"], self._batches()
        if saved == batches:
            self._step = progress["step"]
            if self._micro_steps_left():
                path = checkpoint / ROLLOUTS_FILE.format(process=self.accelerator.process_index)
                self._buffered_inputs = load_tree(path, self.accelerator.device)
        elif progress["step"] % (saved["steps_per_generation"] * saved["num_iterations"]):
            changed = [f"{name} {saved[name]}, now {batches[name]}" for name in saved if saved[name] != batches[name]]
            _logger.warning(
                f"{checkpoint} was saved in the middle of a generation cycle, whose rollouts this run cannot split as "
                f"it was begun ({'; '.join(changed)}). They are dropped and the rest of the cycle is generated anew: "
                "the weights will not be those of the run that was never interrupted."
            )

    # ---------------------------------------------------------------------------------------------------------- helpers

    def _batches(self) -> dict[str, int]:
        """What decides how rollouts are split over processes and steps."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
        names += ("num_iterations", "num_generations")
        return {"processes": self.accelerator.num_processes} | {name: getattr(self.args, name) for name in names}

    def _micro_steps_left(self) -> int:
        """Micro-steps that the generation cycle still has, 0 at its end."""
        return -self._step % (self.args.steps_per_generation * self.num_iterations)

    def _rollouts_left(self) -> list[dict[str, Any] | None]:
        """The micro-batches that the generation cycle still needs, `None` at the indices of the others."""
        parts = self.args.steps_per_generation
        needed = {(self._step + ahead) % parts for ahead in range(min(self._micro_steps_left(), parts))}
        return [batch if part in needed else None for part, batch in enumerate(self._buffered_inputs)]
