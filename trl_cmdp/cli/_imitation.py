"""Imitation alone, for `calibrate`: a copy of the student trained by GKD on problems that it is not measured on."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._messages import without_secrets
from ._arguments import Mistake, mistakes, positive_float, positive_int, refusals
from ._evaluation import load_student, load_tokenizer, problems_of, replace_arguments, task_of, teacher_server_key
from ._images import fingerprint_of_problems, load_processor


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

NUM_GENERATIONS = 2  # GRPO's least: imitation compares no rollouts, so it takes as many prompts as it can
STEPS, LEARNING_RATE, BATCH_SIZE, SPLIT = 0, 1e-5, 32, "train"
RUN_FILE = "imitation.json"


def add_imitation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command."""
    group = parser.add_argument_group("imitation", "a short GKD run from the student, for the lower end of the range")
    for name, kind, default, description in (
        ("steps", int, STEPS, f"optimizer steps (default: {STEPS}, none)"),
        ("learning_rate", positive_float, LEARNING_RATE, f"learning rate, the run's own (default: {LEARNING_RATE:g})"),
        ("batch_size", positive_int, BATCH_SIZE, f"rollouts a step (default: {BATCH_SIZE})"),
        ("split", str, SPLIT, f"split of its problems (default: {SPLIT})"),
        ("problems", positive_int, None, "problems, repeated if they are few (default: those it takes)"),
    ):
        group.add_argument(f"--imitation_{name}", type=kind, default=default, help=description)


def check_imitation_arguments(arguments: argparse.Namespace) -> None:
    """Check the options before anything is loaded."""
    if arguments.imitation_steps < 0:
        raise Mistake(f"--imitation_steps must be at least 0, got {arguments.imitation_steps}.")
    if arguments.imitation_steps == 0:
        return
    if arguments.imitation_batch_size % NUM_GENERATIONS:
        raise Mistake(
            f"--imitation_batch_size must be a multiple of {NUM_GENERATIONS}, got {arguments.imitation_batch_size}."
        )
    if arguments.backend == "vllm":
        raise Mistake(
            "--backend vllm cannot generate for a student that this process trains: run `trl-cmdp gkd`, evaluate the "
            "student before and after it, and give both to --records."
        )
    import torch

    if torch.cuda.device_count() > 1:
        raise Mistake("--imitation_steps trains on one GPU: set CUDA_VISIBLE_DEVICES=0.")


def imitate(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """
    Train a copy of the student by imitation alone, unless the folder holds it already, and save it in the folder with
    `imitation.json` beside it. Returns that file's content: the `settings` of the run, and the mean cost of the
    rollouts of each step, `mean_costs`. A folder that holds another run is a [`Mistake`].
    """
    from datasets.exceptions import DatasetsError

    from ..evaluation.provenance import library_versions, tokenizer_fingerprint, weights_fingerprint
    from ..teachers import TeacherServerError

    steps, batch_size = arguments.imitation_steps, arguments.imitation_batch_size
    num_problems = arguments.imitation_problems or steps * batch_size // NUM_GENERATIONS
    with mistakes(DatasetsError):
        tokenizer = load_tokenizer(arguments)
        problems = _train_problems(tokenizer, num_problems, arguments)
    settings = {
        "student": arguments.student,
        "student_fingerprint": weights_fingerprint(arguments.student),
        "teacher": arguments.teacher or arguments.teacher_model_server_url or arguments.teacher_adapter_name,
        "teacher_fingerprint": weights_fingerprint(arguments.teacher) if arguments.teacher else None,
        "teacher_dtype": arguments.dtype,
        "task": arguments.dataset or arguments.task,
        "split": arguments.imitation_split,
        "num_problems": num_problems,
        "problems_fingerprint": fingerprint_of_problems(problems),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "steps": steps,
        "learning_rate": arguments.imitation_learning_rate,
        "batch_size": batch_size,
        "num_generations": NUM_GENERATIONS,
        "temperature": arguments.temperature,
        "teacher_beta": arguments.teacher_beta,
        "teacher_eos_token": arguments.teacher_eos_token,
        "chat_template": arguments.chat_template,
        "chat_template_kwargs": arguments.chat_template_kwargs,
        "cost_scope": arguments.cost_scope,
        "max_completion_length": arguments.max_new_tokens or task_of(arguments).MAX_COMPLETION_LENGTH,
        "seed": arguments.seed,
        "versions": library_versions(),
    }
    settings = without_secrets(settings)
    file = folder / RUN_FILE
    if file.exists():
        found = _read_run(file)
        for name, value in settings.items():
            before = found["settings"].get(name)
            if before != value:
                raise Mistake(
                    f"{file} is of an imitation with another `{name}`: {before!r}, now {value!r}. "
                    "Choose another --output_dir, or delete the folder."
                )
        return found
    with mistakes(DatasetsError, TeacherServerError, NotImplementedError):
        trainer = _make_trainer(tokenizer, problems, arguments, settings, folder)
    with refusals():
        trainer.train()
    trainer.save_model(str(folder))
    costs = [entry["constraint/cost"] for entry in trainer.state.log_history if "constraint/cost" in entry]
    run = {"settings": settings, "mean_costs": costs}
    file.write_text(json.dumps(run, indent=2, allow_nan=False) + "\n")  # last: where it is, the student is whole
    return run


def _read_run(file: Path) -> dict[str, Any]:
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Mistake(f"{file} is damaged ({error}): delete its folder, or choose another --output_dir.") from error
    if not (
        isinstance(run, dict) and isinstance(run.get("settings"), dict) and isinstance(run.get("mean_costs"), list)
    ):
        raise Mistake(f"{file} is not of an imitation: delete its folder, or choose another --output_dir.")
    return run


def _make_trainer(
    tokenizer: "PreTrainedTokenizerBase",
    problems: "Dataset",
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    folder: Path,
) -> Any:
    import torch
    from transformers import PrinterCallback

    from .. import GKDDistillConfig, GKDDistillTrainer
    from .._prompts import where_images
    from ._progress import TrainingProgress

    on_gpu = torch.cuda.is_available()
    # As the training commands do: trained weights are float32.
    has_images = where_images(problems, "the problems") is not None
    student = load_student(replace_arguments(arguments, dtype="float32"), trainable=True, with_images=has_images)
    names = ("learning_rate", "num_generations", "max_completion_length", "temperature", "seed", "teacher_beta")
    names = (*names, "chat_template_kwargs", "teacher_eos_token")
    trainer = GKDDistillTrainer(
        model=student,
        args=GKDDistillConfig(
            output_dir=str(folder),
            max_steps=settings["steps"],
            per_device_train_batch_size=settings["batch_size"],
            cost_scope=settings["cost_scope"],
            teacher_model_revision=arguments.teacher_model_revision,
            teacher_adapter_name=arguments.teacher_adapter_name,
            teacher_model_server_url=arguments.teacher_model_server_url,
            teacher_model_server_api_key=teacher_server_key(),
            teacher_model_init_kwargs={"dtype": arguments.dtype},
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not on_gpu,
            bf16=on_gpu and torch.cuda.is_bf16_supported(),
            **{name: settings[name] for name in names},
        ),
        train_dataset=problems,
        processing_class=load_processor(arguments.student, tokenizer, arguments.chat_template)
        if has_images
        else tokenizer,
        callbacks=[TrainingProgress()],
        teacher_model=arguments.teacher,
    )
    trainer.remove_callback(PrinterCallback)  # it would print every log
    trainer.how_to_resume = None
    return trainer


def _train_problems(tokenizer: "PreTrainedTokenizerBase", count: int, arguments: argparse.Namespace) -> "Dataset":
    """Problems to imitate on, none of which is measured on."""
    task = task_of(arguments)
    # Those of a smaller number are the first ones of a larger number, so the measured ones can be cut off.
    problems_measured = problems_of(task, tokenizer, arguments)
    measured = len(problems_measured) if arguments.imitation_split == arguments.split else 0
    options = replace_arguments(arguments, num_problems=measured + count, split=arguments.imitation_split)
    try:
        problems = problems_of(task, tokenizer, options).select(range(measured, measured + count))
    except ValueError as error:
        raise ValueError(
            f"The problems to imitate on, {count} of the split {arguments.imitation_split!r}"
            f"{f' after the {measured} measured on' if measured else ''}: {error} See --imitation_split and "
            "--imitation_problems."
        ) from error
    held_out = set(map(str, problems_measured["prompt"]))
    kept = [index for index, prompt in enumerate(problems["prompt"]) if str(prompt) not in held_out]
    if not kept:
        raise ValueError("Every problem to imitate on is measured on: choose another --imitation_split.")
    return problems.select(kept)
