"""Training and evaluating one student of a task: what the demo and every cell of a comparison are made of."""

import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from ..trainers.engine.config import DistillConfig
    from ..trainers.engine.distill_trainer import DistillTrainer

# Trainer and config, by the name that an experiment gives. Without a teacher the constrained trainer is GRPO.
TRAINERS = {
    "constrained": ("ConstrainedDistillTrainer", "ConstrainedDistillConfig"),
    "grpo": ("ConstrainedDistillTrainer", "ConstrainedDistillConfig"),
    "lagrangian": ("LagrangianDistillTrainer", "LagrangianDistillConfig"),
    "gkd": ("GKDDistillTrainer", "GKDDistillConfig"),
    "minillm": ("MiniLLMDistillTrainer", "MiniLLMDistillConfig"),
}
TASKS = ("arithmetic", "nested", "chains")
PROMPTS_PER_STEP, NUM_GENERATIONS = 16, 8
LEARNING_RATE = 3e-4
_EVALUATION_BATCH_SIZE = 250


@dataclass(frozen=True)
class Answer:
    """
    A model's answer to one problem.

    Args:
        right (`bool`):
            Whether the final answer is right.
        valid (`bool`):
            Whether every step is valid.
        costs (`torch.Tensor`):
            Divergence from the teacher at each completion token, of shape `(L,)`, in nats.
    """

    right: bool
    valid: bool
    costs: "torch.Tensor"


def task_module(task: str) -> Any:
    """Module of a task: its problems, its reward, its models."""
    return import_module(f"trl_cmdp.tasks.{task}")


def config_class(trainer: str) -> "type[DistillConfig]":
    """Config class of a trainer's name in [`TRAINERS`]."""
    return getattr(import_module("trl_cmdp"), TRAINERS[trainer][1])


def set_up_process() -> None:
    """Quiet libraries and one thread."""
    import torch
    from transformers.utils import logging

    # Renamings inside transformers, which no argument of a command can answer.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The models are so small that a second thread costs more in waiting than it gives.
    torch.set_num_threads(1)


def load_models(task: str) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel, PreTrainedModel]":
    """Tokenizer, untrained student and teacher of a task."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = task_module(task).demo_model_path
    return (
        AutoTokenizer.from_pretrained(path("student")),
        AutoModelForCausalLM.from_pretrained(path("student")),
        AutoModelForCausalLM.from_pretrained(path("teacher")),
    )


def training_args(
    trainer: str,
    task: str,
    config_fields: dict[str, Any],
    *,
    steps: int,
    seed: int,
    cost_limit: float,
    output_dir: str | Path,
) -> "DistillConfig":
    """
    Training arguments of one student, the same for every method but for `config_fields`.

    Args:
        trainer (`str`):
            Name in [`TRAINERS`].
        task (`str`):
            Task, which gives the length of a completion.
        config_fields (`dict[str, Any]`):
            Fields of the trainer's config, which override everything else.
        steps (`int`):
            Optimizer steps.
        seed (`int`):
            Seed of initialisation, rollouts and order.
        cost_limit (`float`):
            Limit, in nats per token.
        output_dir (`str` or `Path`):
            Folder of the trainer.

    Returns:
        [`DistillConfig`]: The arguments.

    Raises:
        ValueError, TypeError: If the config refuses a field.
    """
    shared = {
        "output_dir": str(output_dir),
        "cost_limit": cost_limit,
        "num_generations": NUM_GENERATIONS,
        "per_device_train_batch_size": PROMPTS_PER_STEP * NUM_GENERATIONS,
        "max_completion_length": task_module(task).MAX_COMPLETION_LENGTH,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "seed": seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,  # the models are tiny: a CPU is faster in float32
        "gradient_checkpointing": False,
    }
    return config_class(trainer)(**{**shared, **config_fields})


def train_student(
    student: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    teacher: "PreTrainedModel",
    args: "DistillConfig",
    trainer: str,
    task: str,
    callback: "TrainerCallback",
) -> "DistillTrainer":
    """Train the student in place, and return its trainer, which holds the log history."""
    from transformers import PrinterCallback

    module = task_module(task)
    trainer_class = getattr(import_module("trl_cmdp"), TRAINERS[trainer][0])
    run = trainer_class(
        model=student,
        reward_funcs=module.final_answer_reward,
        args=args,
        train_dataset=module.load_problems(args.max_steps * PROMPTS_PER_STEP, "train", args.seed),
        processing_class=tokenizer,
        callbacks=[callback],
        teacher_model=None if trainer == "grpo" else teacher,
    )
    run.remove_callback(PrinterCallback)  # the callback's line shows what matters
    run.train()
    return run


def evaluate_student(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    teacher: "PreTrainedModel",
    problems: "Dataset",
    task: str,
    seed: int,
    *,
    greedy: bool = False,
) -> list[Answer]:
    """One answer to each problem, sampled at temperature 1 or greedy, with its costs at temperature 1."""
    from ..evaluation import sample_rollouts, score_rollouts

    module = task_module(task)
    rollouts = sample_rollouts(
        model,
        tokenizer,
        problems["prompt"],
        max_new_tokens=module.MAX_COMPLETION_LENGTH,
        greedy=greedy,
        batch_size=_EVALUATION_BATCH_SIZE,
        seed=seed,
    )
    costs = score_rollouts(rollouts, model, teacher, batch_size=_EVALUATION_BATCH_SIZE)
    completions = [rollout.completion for rollout in rollouts]
    right = [reward == 1.0 for reward in module.final_answer_reward(completions, problems["answer"])]
    valid = map(module.valid_steps, problems["prompt"], completions)
    return [Answer(*values) for values in zip(right, valid, costs, strict=True)]
