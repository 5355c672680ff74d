"""`--dry_run` of a training command: everything up to the end of the first step, and nothing kept."""

import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._messages import message
from ..trainers.engine.checks import check_trackers
from ..trainers.engine.config import DistillConfig
from ..trainers.engine.distill_trainer import DistillTrainer
from ._arguments import Mistake, mistakes, refusals


_SHOWN_CHARACTERS = 300  # of a prompt or a completion


class _FirstStep(TrainerCallback):
    """Ends training after the first step, and measures it."""

    num_steps = 0  # of the run
    seconds: float | None = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.num_steps = state.max_steps
        self._start = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.seconds = time.monotonic() - self._start
        control.should_training_stop = True


@contextmanager
def nothing_kept(args: DistillConfig) -> Iterator[None]:
    """Change the arguments of a run to those of its dry run: nothing is saved, evaluated, tracked, pushed or deleted."""
    with mistakes():
        check_trackers(args.report_to)
    args.report_to, args.push_to_hub, args.disable_tqdm = [], False, True
    args.logging_strategy, args.logging_steps = "steps", 1
    args.save_strategy = args.eval_strategy = "no"
    args.eval_on_start = args.load_best_model_at_end = args.log_completions = False
    if args.overwrite_output_dir and not args.resume_from_checkpoint:  # it would delete what is there
        args.output_dir = os.path.join(tempfile.gettempdir(), f"trl-cmdp-dry-run-{os.getpid()}")
    was_there = Path(args.output_dir).exists()
    try:
        yield
    finally:
        if not was_there:
            shutil.rmtree(args.output_dir, ignore_errors=True)


def dry_run(trainer: DistillTrainer) -> int:
    """Train the first step, and say what was found. Returns 0."""
    first = _FirstStep()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(first)
    try:
        with refusals():
            trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except torch.OutOfMemoryError as error:
        raise Mistake(
            "The first step does not fit into memory: lower --per_device_train_batch_size (and raise "
            "--gradient_accumulation_steps), --max_completion_length or --divergence_memory_mb, or use "
            f"--use_peft. {str(error).splitlines()[0]}"
        ) from error
    trainer.accelerator.print(message(_found(trainer, first)))
    return 0


def _found(trainer: DistillTrainer, first: _FirstStep) -> str:
    """What a user would want to know before a long run."""
    if first.seconds is None:
        return "Dry run: the run that is resumed is complete, no step is left."
    rollout = {name: values[0] for name, values in trainer.latest_rollouts().items()}
    logged: dict[str, float] = next(entry for entry in trainer.state.log_history if "reward" in entry)
    lines = [
        "Dry run: one step was trained and thrown away. Nothing is saved.",
        "",
        f"first prompt:   {_shown(rollout['prompt'])}",
        *(f"the teacher's:  {_shown(prompt)}" for prompt in trainer.latest_teacher_prompts()[:1]),
        f"its completion: {_shown(rollout['completion'])}",
        f"its scores:     {_scores(rollout)}",
        f"all rollouts:   {_averages(logged)}",
        f"memory:         {_memory()}",
        f"time:           {first.seconds:.1f} s for the first step, which is often the slowest, of {first.num_steps}",
    ]
    return "\n".join(lines)


def _shown(text: Any) -> str:
    """A prompt or a completion, the content of messages as text, on one line."""
    if isinstance(text, list):
        text = " | ".join(str(one.get("content") or "") for one in text)
    text = " ".join(str(text).split())
    return (
        text
        if len(text) <= _SHOWN_CHARACTERS
        else f"{text[: _SHOWN_CHARACTERS // 2]} ... {text[-_SHOWN_CHARACTERS // 2 :]}"
    )


def _scores(rollout: dict[str, Any]) -> str:
    scores = {name: value for name, value in rollout.items() if name not in ("prompt", "completion")}
    shown = {name: f"{value:.4g}" for name, value in scores.items() if isinstance(value, float)}
    shown |= {name: "yes" if value else "no" for name, value in scores.items() if isinstance(value, bool)}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _averages(logged: dict[str, float]) -> str:
    """Means over the rollouts of the step, as they were logged."""
    parts = [f"reward {logged['reward']:.3g}"]
    if "constraint/cost" in logged:
        parts.append(f"cost {logged['constraint/cost']:.3g}")
    if "constraint/limit" in logged:
        share = logged["constraint/satisfaction_rate"]
        parts.append(f"limit {logged['constraint/limit']:.3g}, {share:.0%} of the rollouts are within it")
    parts.append(f"{logged['completions/mean_length']:.4g} tokens")
    return ", ".join([*parts, f"{logged['completions/clipped_ratio']:.0%} cut at --max_completion_length"])


def _memory() -> str:
    """Most memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_reserved() / 2**30:.1f} GiB of the GPU, {peak} beside it, at most"
    return f"{peak} at most"
