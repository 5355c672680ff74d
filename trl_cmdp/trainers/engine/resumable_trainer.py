"""
A `GRPOTrainer` whose interrupted runs end as if they had never stopped. Every touch of TRL's and transformers' state
between steps is in this file; tests/trainers/test_trl_hooks.py pins them.
"""

import json
import logging
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch.utils.data import Sampler
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..._files import RUN_FILE
from ...teachers import keep_differentiable
from ..telemetry.hub import warn_if_failed
from ..telemetry.run_settings import of_rollouts
from .checkpoints import (
    METHOD_STATE_FILE,
    PROGRESS_FILE,
    ROLLOUTS_FILE,
    check_whole,
    delete_older,
    last_whole_checkpoint,
    load_tree,
    make_room,
    newest_written,
    next_session,
    read_progress,
    save_tree,
    saved_step,
    start_checkpoint,
    step_of,
    write_progress,
)
from .config import DistillConfig
from .final_save import written_beside
from .finite_gradients import FiniteGRPOTrainer, nonfinite_weights
from .gradient_check import GradientCheck
from .guards import CheckpointOnSignal, RefusedRun, named_failure, sole_run
from .run_identity import REWARDS, RunIdentity, data_fingerprint, settings_of, student_fingerprint


_logger = logging.getLogger(__name__)


class ResumableGRPOTrainer(FiniteGRPOTrainer):
    """
    [`~trl.GRPOTrainer`] that resumes exactly, from any checkpoint. The only change is what a checkpoint holds: also the
    rollouts that the generation cycle still needs, the logging window, the state of the method, and what the run is
    known by. SIGTERM and Ctrl-C end a run with a checkpoint, and two runs cannot train into one folder.

    Takes the arguments of [`~trl.GRPOTrainer`].
    """

    _train_sampler: Sampler | None = None  # of the dataset, unless it is iterable
    _session = 1  # number of this training among those that have left checkpoints in the folder
    _run: dict[str, Any]  # what this run is known by
    # How a stopped run is resumed, for messages: on the command line by a command. A run that nobody resumes, `None`, is
    # stopped by Ctrl-C at once.
    how_to_resume: str | None = "`trainer.train(resume_from_checkpoint=True)`"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._start = student_fingerprint(self.model)
        keep_differentiable(self.model)
        self.add_callback(GradientCheck(self.accelerator))
        self._stop = CheckpointOnSignal(self.accelerator)
        self.add_callback(self._stop)

    # ------------------------------------------------------------------------------------------------ for subclasses

    def _saved_state(self) -> dict[str, Any]:
        """What a resumed run must find again, of what JSON has."""
        return {}

    def _load_saved_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def _identity(self) -> dict[str, Any]:
        """What the run is known by: all that decides its weights."""
        return {
            "method": "GRPO",
            "student": self._start,
            "teacher": {},
            "data": data_fingerprint(self.train_dataset),
            REWARDS: list(self.reward_func_names),
            **settings_of(self.args),
        }

    def _run_settings(self) -> dict[str, Any]:
        """What the folder of the student says of its run, see [`~telemetry.run_settings`]."""
        return of_rollouts(self.args, self.train_dataset)

    def _logging_window(self) -> dict[str, Any]:
        """What has been counted in training since the last log."""
        return {"metrics": {name: list(map(float, values)) for name, values in self._metrics["train"].items()}}

    def _load_logging_window(self, window: dict[str, Any]) -> None:
        self._metrics["train"].update(window["metrics"])

    # -------------------------------------------------------------------------------------------------------- training

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        [`~transformers.Trainer.train`], where a resumed run continues as if it had never stopped. SIGTERM and, outside
        notebooks, Ctrl-C let the step under way end, save a checkpoint, and then end the process, Ctrl-C by
        `KeyboardInterrupt`. Ctrl-C once more ends it at once. A run that is complete stays as it is.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Folder of a checkpoint, or `True` for the newest one of this run in `args.output_dir` that is whole.

        Raises:
            ValueError: If that checkpoint was cut off or damaged, or is another run's, or if there is none. Without one,
                if `args.output_dir` holds another run.
            RuntimeError: If another run is training into `args.output_dir`, or if the weights are not finite at the end.
        """
        resumed = self.how_to_resume is not None
        with sole_run(self.args.output_dir, self.accelerator), self._stop.listening(to_ctrl_c=resumed):
            checkpoint = self._starting_point(resume_from_checkpoint)
            try:
                output = super().train(checkpoint, *args, **kwargs)
            finally:
                if resumed and self._stop.told is not None and self.accelerator.is_main_process:
                    self._say_how_to_resume()
            self._check_weights(Path(self.args.output_dir))
            return output

    def latest_rollouts(self) -> dict[str, list[Any]]:
        """The rollouts of the last generation: prompts, completions, rewards and what else a method says of each."""
        columns = {name: self._logs[name] for name in ("prompt", "completion")}
        return {
            name: list(values) for name, values in {**columns, **self._logs["rewards"], **self._logs["extra"]}.items()
        }

    def _say_how_to_resume(self) -> None:
        checkpoint = newest_written(self.args.output_dir)
        if checkpoint is None:
            _logger.warning(f"Stopped at step {self.state.global_step}, before its first checkpoint.")
            return
        _logger.warning(
            f"Stopped at step {self.state.global_step}. {checkpoint} is the newest checkpoint. Continue with: "
            f"{self.how_to_resume}"
        )

    def _starting_point(self, asked: str | bool | None) -> str | None:
        """Checkpoint that training begins from. One process looks, for all."""
        self._run = self._identity()
        found: list[Any] = [None, 0]
        if self.accelerator.is_main_process:
            try:
                found = [self._choose_checkpoint(asked), next_session(self.args.output_dir)]
            except RefusedRun as refusal:
                found[0] = refusal
        broadcast_object_list(found)
        if isinstance(found[0], RefusedRun):
            raise found[0]
        checkpoint, self._session = found
        if checkpoint is not None and self.accelerator.is_main_process:
            _logger.warning(f"The run continues from step {saved_step(checkpoint)} ({checkpoint}).")
        return checkpoint

    def _choose_checkpoint(self, asked: str | bool | None) -> str | None:
        args = self.args
        own = isinstance(args, DistillConfig)  # a plain `GRPOConfig` does without a teacher
        identity = RunIdentity(type(self).__name__, self._run, (args.resume_with_changes or ()) if own else ())
        if asked is True:
            return last_whole_checkpoint(args.output_dir, identity)
        if asked:
            check_whole(asked, identity)
            return asked
        make_room(args.output_dir, identity, overwrite=own and args.overwrite_output_dir)
        return None

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed when it was complete: no step is left
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    # --------------------------------------------------------------------------------------------------------- writing

    def save_model(self, output_dir=None, _internal_call=False):
        """
        [`~transformers.Trainer.save_model`], but that the folder holds a whole model at any time: this one, or until it is
        written the one before.

        Args:
            output_dir (`str`, *optional*):
                Folder, `args.output_dir` if `None`.

        Raises:
            RuntimeError: If it could not be written, or the weights are not finite.
        """
        folder = Path(output_dir or self.args.output_dir)
        if step_of(folder) is not None:  # a checkpoint is whole by its list of files
            super().save_model(output_dir, _internal_call)
            self._save_run_settings(folder)
            return
        if names := nonfinite_weights(self.model):
            raise RuntimeError(f"The student's weights are not finite ({', '.join(names[:3])}): nothing is saved.")
        left = "What was there before is whole. Once the cause is gone (if the disk is full, make room), save again."
        with named_failure("The model", folder, left), written_beside(folder, self.args.should_save) as beside:
            super().save_model(str(beside), _internal_call=True)
            self._save_run_settings(beside)
            if self.is_deepspeed_enabled:  # each process may write a part
                self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_run_settings(self, folder: Path) -> None:
        if self.args.should_save:
            (folder / RUN_FILE).write_text(json.dumps(self._run_settings(), indent=2) + "\n")

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self._check_weights(folder)
        left = (
            "The ones before it are whole: once the cause is gone (if the disk is full, make room), continue with "
            "`trainer.train(resume_from_checkpoint=True)`, which passes over this one."
        )
        limit = self.args.save_total_limit
        with named_failure("The checkpoint", folder, left):
            if self.args.should_save:
                start_checkpoint(folder)
            self.accelerator.wait_for_everyone()
            self.args.save_total_limit = None  # transformers would delete by the folders' times
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
        if limit and self.args.should_save:
            delete_older(folder, limit, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self.is_world_process_zero():
            return
        earlier = [] if self.push_in_progress is None else [*self.push_in_progress.jobs]
        super()._push_from_checkpoint(checkpoint_folder)
        for push in [] if self.push_in_progress is None else self.push_in_progress.jobs:
            if push not in earlier:
                push.add_done_callback(warn_if_failed)

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
                "run": self._run,
                "session": self._session,
                "global_step": self.state.global_step,
                "step": self._step,
                "batches": self._batches(),
                "logging_window": self._logging_window(),
                "entropy": [self.entropy_coef, self._last_world_entropy],
                "nonfinite_in_a_row": self._nonfinite_in_a_row,
            }
            write_progress(folder, progress)

    # --------------------------------------------------------------------------------------------------------- resuming

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed(Path(resume_from_checkpoint))

    def _load_best_model(self):
        super()._load_best_model()
        self._load_renamed(Path(self.state.best_model_checkpoint))

    def _load_renamed(self, checkpoint: Path) -> None:
        """
        Load weights that transformers saves by other names than the model has (of vision-language models, of experts):
        when it resumes it looks for the model's own names, and silently leaves out what it does not find.
        """
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not isinstance(self.model, PreTrainedModel):
            return
        saved: set[str] = set()
        for path in checkpoint.glob("model*.safetensors"):
            with safe_open(path, "pt") as file:
                saved |= set(file.keys())
        if not saved <= self.model.state_dict().keys():
            self.model.load_state_dict(type(self.model).from_pretrained(checkpoint, dtype="auto").state_dict())

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

        progress = read_progress(checkpoint)
        if self.use_adaptive_entropy:  # TRL writes it after older checkpoints are deleted
            self.entropy_coef, self._last_world_entropy = progress["entropy"]
        self._nonfinite_in_a_row = progress["nonfinite_in_a_row"]
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
