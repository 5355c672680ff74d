"""Imitation alone, for `calibrate`: a copy of the student trained by GKD on problems that it is not measured on."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._arguments import positive_float, positive_int
from ._evaluation import TEACHER_KEY_VARIABLE, load_problems, load_student, load_task, replace_arguments


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerCallback

NUM_GENERATIONS = 2  # GRPO's least: imitation compares no rollouts, so it takes as many prompts as it can
STEPS, LEARNING_RATE, BATCH_SIZE, SPLIT = 0, 1e-5, 32, "train"
RUN_FILE = "imitation.json"


def add_imitation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command."""
    group = parser.add_argument_group("imitation", "a short GKD run from the student, for the lower end of the range")
    group.add_argument("--imitation_steps", type=int, default=STEPS, help=f"optimizer steps (default: {STEPS}, none)")
    group.add_argument(
        "--imitation_learning_rate",
        type=positive_float,
        default=LEARNING_RATE,
        help=f"learning rate, the run's own (default: {LEARNING_RATE:g})",
    )
    group.add_argument(
        "--imitation_batch_size",
        type=positive_int,
        default=BATCH_SIZE,
        help=f"rollouts a step (default: {BATCH_SIZE})",
    )
    group.add_argument("--imitation_split", default=SPLIT, help=f"split of its problems (default: {SPLIT})")
    group.add_argument(
        "--imitation_problems", type=positive_int, help="problems, repeated if they are few (default: those it takes)"
    )


def check_imitation_arguments(arguments: argparse.Namespace) -> None:
    """
    Check the options before anything is loaded.

    Raises:
        ValueError: If they cannot be met.
    """
    if arguments.imitation_steps < 0:
        raise ValueError(f"--imitation_steps must be at least 0, got {arguments.imitation_steps}.")
    if arguments.imitation_steps == 0:
        return
    if arguments.imitation_batch_size % NUM_GENERATIONS:
        raise ValueError(
            f"--imitation_batch_size must be a multiple of {NUM_GENERATIONS}, got {arguments.imitation_batch_size}."
        )
    import torch

    if torch.cuda.device_count() > 1:
        raise ValueError("--imitation_steps trains on one GPU: set CUDA_VISIBLE_DEVICES=0.")
    if arguments.backend == "vllm":
        raise ValueError(
            "--backend vllm cannot generate for a student that this process trains: run `trl-cmdp gkd`, evaluate the "
            "student before and after it, and give both to --records."
        )


def imitate(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """
    Train a copy of the student by imitation alone, unless the folder has it.

    Args:
        arguments (`argparse.Namespace`):
            Arguments of the command.
        folder (`Path`):
            Where the trained student is saved, and `imitation.json` beside it.

    Returns:
        `dict[str, Any]`: The `settings` of the run, and the mean cost of the rollouts of each step, `mean_costs`.

    Raises:
        ValueError: For a mistake in what was asked for, or if the folder holds another run.
    """
    from ..evaluation.progress import show_progress
    from ..evaluation.provenance import library_versions, weights_fingerprint

    task = load_task(arguments)
    steps, batch_size = arguments.imitation_steps, arguments.imitation_batch_size
    settings = {
        "student": arguments.student,
        "student_fingerprint": weights_fingerprint(arguments.student),
        "teacher": arguments.teacher or arguments.teacher_model_server_url or arguments.teacher_adapter_name,
        "task": arguments.dataset or arguments.task,
        "split": arguments.imitation_split,
        "num_problems": arguments.imitation_problems or steps * batch_size // NUM_GENERATIONS,
        "steps": steps,
        "learning_rate": arguments.imitation_learning_rate,
        "batch_size": batch_size,
        "num_generations": NUM_GENERATIONS,
        "temperature": arguments.temperature,
        "teacher_beta": arguments.teacher_beta,
        "cost_scope": arguments.cost_scope,
        "max_completion_length": arguments.max_new_tokens or task.MAX_COMPLETION_LENGTH,
        "seed": arguments.seed,
        "versions": library_versions(),
    }
    file = folder / RUN_FILE
    if file.exists():
        found = json.loads(file.read_text())
        for name, value in settings.items():
            if found["settings"][name] != value:
                raise ValueError(
                    f"{file} is of an imitation with another `{name}`: {found['settings'][name]!r}, now {value!r}. "
                    "Choose another --output_dir, or delete the folder."
                )
        return found
    trainer = _make_trainer(arguments, task, settings, folder)
    with show_progress("imitation") as progress:
        trainer.add_callback(_steps_callback(progress))
        trainer.train()
    trainer.save_model(str(folder))
    costs = [entry["constraint/cost"] for entry in trainer.state.log_history if "constraint/cost" in entry]
    run = {"settings": settings, "mean_costs": costs}
    file.write_text(json.dumps(run, indent=2, allow_nan=False) + "\n")  # last: where it is, the student is whole
    return run


def _make_trainer(arguments: argparse.Namespace, task: Any, settings: dict[str, Any], folder: Path) -> Any:
    import torch
    from datasets.exceptions import DatasetsError
    from transformers import PrinterCallback

    from .. import GKDDistillConfig, GKDDistillTrainer
    from ..teachers import TeacherServerError

    on_gpu = torch.cuda.is_available()
    try:
        # As the training commands do: trained weights are float32.
        student, tokenizer = load_student(replace_arguments(arguments, dtype="float32"), trainable=True)
        trainer = GKDDistillTrainer(
            model=student,
            args=GKDDistillConfig(
                output_dir=str(folder),
                max_steps=settings["steps"],
                learning_rate=settings["learning_rate"],
                per_device_train_batch_size=settings["batch_size"],
                num_generations=NUM_GENERATIONS,
                max_completion_length=settings["max_completion_length"],
                temperature=settings["temperature"],
                seed=settings["seed"],
                teacher_beta=settings["teacher_beta"],
                cost_scope=settings["cost_scope"],
                teacher_adapter_name=arguments.teacher_adapter_name,
                teacher_model_server_url=arguments.teacher_model_server_url,
                teacher_model_server_api_key=os.environ.get(TEACHER_KEY_VARIABLE),
                teacher_model_init_kwargs={"dtype": arguments.dtype},
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=not on_gpu,
                bf16=on_gpu and torch.cuda.is_bf16_supported(),
            ),
            train_dataset=_train_problems(task, tokenizer, settings["num_problems"], arguments),
            processing_class=tokenizer,
            teacher_model=arguments.teacher,
        )
    except (DatasetsError, TeacherServerError, NotImplementedError) as error:
        raise ValueError(str(error)) from error
    trainer.remove_callback(PrinterCallback)  # it would print every log
    return trainer


def _steps_callback(progress: Callable[[int, int], None]) -> "TrainerCallback":
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            progress(state.global_step, state.max_steps)

    return Steps()


def _train_problems(
    task: Any, tokenizer: "PreTrainedTokenizerBase", count: int, arguments: argparse.Namespace
) -> "Dataset":
    """Problems to imitate on, none of which is measured on."""
    # Those of a smaller number are the first ones of a larger number, so the measured ones can be cut off.
    measured = arguments.num_problems if arguments.imitation_split == arguments.split else 0
    options = replace_arguments(arguments, num_problems=measured + count, split=arguments.imitation_split)
    try:
        problems = load_problems(task, tokenizer, options).select(range(measured, measured + count))
    except ValueError as error:
        raise ValueError(
            f"The problems to imitate on, {count} of the split {arguments.imitation_split!r}"
            f"{f' after the {measured} measured on' if measured else ''}: {error} See --imitation_split and "
            "--imitation_problems."
        ) from error
    held_out = set(map(str, load_problems(task, tokenizer, arguments)["prompt"]))
    kept = [place for place, prompt in enumerate(problems["prompt"]) if str(prompt) not in held_out]
    if not kept:
        raise ValueError("Every problem to imitate on is measured on: choose another --imitation_split.")
    return problems.select(kept)
